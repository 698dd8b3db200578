"""Metrics of whole score curves, exact (every score is a threshold): AUROC and two average precisions.

Shapes: S samples of all processes, C classes or labels.
"""

import torch
from torch import Tensor

from dinov3.eval.metrics.base import ScoreMetric
from dinov3.eval.metrics.classification import as_probabilities, check_classes, check_multi_hot, check_scores


class AUROC(ScoreMetric):
    """Area under the receiver operating characteristic, one class against the rest, mean over classes: key `top-1`.

    Classes without any sample, or with all of them, count as 0.
    """

    def __init__(self, *, num_classes: int) -> None:
        super().__init__(num_classes, multilabel=False)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Keep scores `[B, C]` (their softmax, in batches with scores outside [0, 1]) and class numbers `[B]`."""
        check_scores(preds, self.num_classes)
        check_classes(target, self.num_classes)
        if preds.numel() and (float(preds.min()) < 0 or float(preds.max()) > 1):
            preds = preds.softmax(1)
        self.keep(preds, target)

    def compute(self) -> dict[str, Tensor]:
        """`{"top-1": area}`."""
        preds, target = self.gathered()
        return {"top-1": torch.stack([area_under_roc(preds[:, c], target == c) for c in range(preds.shape[1])]).mean()}


class MultilabelAveragePrecision(ScoreMetric):
    """Mean over labels of the average precision: key `top-1`; a label without any sample counts as 0.

    Args:
        num_labels: C.
        voc2007: the interpolated average precision of the PASCAL VOC 2007 challenge (Everingham et al. 2010, section
            4.2): mean over the recall levels 0, 0.1, ..., 1 of the largest precision at that recall or more. Otherwise
            the area under the step curve, the sum over thresholds of precision times gain in recall.
    """

    def __init__(self, *, num_labels: int, voc2007: bool = False) -> None:
        self.voc2007 = voc2007
        super().__init__(num_labels, multilabel=True)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Keep scores `[B, C]` (their sigmoid, in batches that leave [0, 1]) and multi-hot targets `[B, C]`."""
        check_scores(preds, self.num_classes)
        check_multi_hot(preds, target)
        self.keep(as_probabilities(preds), target)

    def compute(self) -> dict[str, Tensor]:
        """`{"top-1": mean average precision}`."""
        preds, target = self.gathered()
        average_precision = _voc2007_average_precision if self.voc2007 else _average_precision
        per_label = [average_precision(*precision_recall(p, t > 0)) for p, t in zip(preds.T, target.T, strict=True)]
        return {"top-1": torch.stack(per_label).mean()}


def cumulative_counts(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """True and false positives at each distinct threshold, from the highest down: two float64 vectors.

    Args:
        scores: `[S]`.
        positive: bool `[S]`.
    """
    ordered, order = scores.sort(descending=True)
    hits = positive[order].double().cumsum(0)
    # Equal scores are one threshold: only the last of each run counts.
    last = torch.ones_like(positive)
    last[:-1] = ordered[1:] != ordered[:-1]
    true = hits[last]
    count = torch.arange(1, len(scores) + 1, device=scores.device, dtype=torch.float64)[last]
    return true, count - true


def area_under_roc(scores: Tensor, positive: Tensor) -> Tensor:
    """Area under the curve of the true over the false positive rate (trapezoids); 0 if one of the classes is empty."""
    true, false = cumulative_counts(scores, positive)
    if true[-1] == 0 or false[-1] == 0:
        return scores.new_zeros(())
    start = true.new_zeros(1)
    tpr, fpr = torch.cat([start, true / true[-1]]), torch.cat([start, false / false[-1]])
    return torch.trapezoid(tpr, fpr).float()


def precision_recall(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall from the lowest threshold up, ended by the point (precision 1, recall 0).

    Without positives the recall is 1 at every threshold.
    """
    true, false = cumulative_counts(scores, positive)
    precision = true / (true + false)
    recall = true / true[-1] if true[-1] > 0 else torch.ones_like(true)
    return torch.cat([precision.flip(0), precision.new_ones(1)]), torch.cat([recall.flip(0), recall.new_zeros(1)])


def _average_precision(precision: Tensor, recall: Tensor) -> Tensor:
    return -(precision[:-1] * recall.diff()).sum().float()


def _voc2007_average_precision(precision: Tensor, recall: Tensor) -> Tensor:
    levels = torch.arange(11, device=recall.device, dtype=recall.dtype) / 10
    reached = recall[None, :] >= levels[:, None]  # [11, thresholds]; recall 1 is always reached
    return torch.where(reached, precision, 0.0).amax(1).mean().float()
