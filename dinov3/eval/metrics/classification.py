"""Metrics that count: top-k accuracy and its relatives, F1, matches with lists of labels, reciprocal rank.

Shapes: B samples, C classes. Ties between scores are broken as `torch.topk` does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dinov3.eval.metrics.base import Metric


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[Tensor]:
    """Top-k accuracies of a batch, in percent: one scalar per entry of `topk`.

    Args:
        output: scores, `[B, C]`.
        target: class numbers, `[B]`.
        topk: numbers of guesses; each at most C.
    """
    return [100.0 * in_top_k(output, target[:, None], k).float().mean() for k in topk]


def in_top_k(preds: Tensor, target: Tensor, k: int) -> Tensor:
    """Whether any entry of a row of `target` `[B, L]` is among the k highest scores of that row: bool `[B]`."""
    best = preds.argmax(1, keepdim=True) if k == 1 else preds.topk(k, dim=1).indices  # [B, k]
    return (best[:, :, None] == target[:, None, :]).flatten(1).any(1)


def check_scores(preds: Tensor, num_classes: int) -> None:
    """Raise if the scores aren't `[B, num_classes]`."""
    if preds.ndim != 2 or preds.shape[1] != num_classes:
        raise ValueError(f"expected scores [B, {num_classes}], got {tuple(preds.shape)}")


def check_classes(target: Tensor, num_classes: int) -> None:
    """Raise if the targets aren't class numbers below `num_classes`."""
    if target.ndim != 1:
        raise ValueError(
            f"expected one class number per sample [B], got targets {tuple(target.shape)}: multi-label data needs a "
            "multi-label metric (MEAN_MULTILABEL_F1, MACRO_MULTILABEL_AVERAGE_PRECISION, ANY_MATCH_ACCURACY, ...)"
        )
    if target.numel() and (int(target.min()) < 0 or int(target.max()) >= num_classes):
        raise ValueError(
            f"targets must be class numbers from 0 to {num_classes - 1}, got {int(target.min())} to "
            f"{int(target.max())}: do the train and the test set have the same classes?"
        )


class TopKAccuracy(Metric):
    """Fraction of samples whose class is among the k highest scores: keys `top-<k>`.

    Args:
        num_classes: C.
        ks: numbers of guesses.
        average: `"micro"`: over samples. `"macro"`: mean of the fraction per class; classes that occur neither as a
            target nor, for k = 1, as a prediction are left out (predicted-only classes thus count as 0 for k = 1).
            `"none"`: the vector per class, 0 for absent classes.
    """

    correct: Tensor
    targets: Tensor
    predictions: Tensor

    def __init__(self, *, num_classes: int, ks: Sequence[int], average: str) -> None:
        if not ks or min(ks) < 1 or max(ks) > num_classes:
            raise ValueError(
                f"top-k accuracy over {num_classes} classes needs k from 1 to {num_classes}, got {list(ks)}"
            )
        if average not in ("micro", "macro", "none"):
            raise ValueError(f"average must be micro, macro or none, got {average!r}")
        self.num_classes, self.ks, self.average = num_classes, tuple(ks), average
        per_class = torch.zeros(num_classes, dtype=torch.int64)
        super().__init__(correct=per_class.repeat(len(self.ks), 1), targets=per_class, predictions=per_class)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count scores `[B, C]` against class numbers `[B]`."""
        check_scores(preds, self.num_classes)
        check_classes(target, self.num_classes)
        self.targets += torch.bincount(target, minlength=self.num_classes)
        self.predictions += torch.bincount(preds.argmax(1), minlength=self.num_classes)
        for row, k in zip(self.correct, self.ks, strict=True):
            hits = target[in_top_k(preds, target[:, None], k)]
            row += torch.bincount(hits, minlength=self.num_classes)

    def compute(self) -> dict[str, Tensor]:
        """`{"top-<k>": fraction}`."""
        correct, targets, predictions = self.merged("correct", "targets", "predictions")
        return {f"top-{k}": self._average(c, targets, predictions, k) for c, k in zip(correct, self.ks, strict=True)}

    def _average(self, correct: Tensor, targets: Tensor, predictions: Tensor, k: int) -> Tensor:
        if self.average == "micro":
            return correct.sum().float() / targets.sum()
        per_class = correct.float() / targets.clamp(min=1)
        if self.average == "none":
            return per_class
        present = (targets + predictions if k == 1 else targets) > 0
        return per_class[present].mean()


class F1Score(Metric):
    """Harmonic mean of precision and recall, `2 tp / (2 tp + fp + fn)`: key `top-1`.

    Args:
        num_classes: C.
        average: `"micro"`: of the summed counts. `"macro"`: mean over classes; of single-label data classes that occur
            neither as a target nor as a prediction are left out, of multi-label data they count as 0.
        multilabel: targets are multi-hot `[B, C]`, and a label is predicted where its score (the sigmoid of it, in
            batches with scores outside [0, 1]) exceeds 0.5. Otherwise targets are class numbers `[B]`, and the class
            with the highest score is predicted.
    """

    correct: Tensor
    targets: Tensor
    predictions: Tensor

    def __init__(self, *, num_classes: int, average: str, multilabel: bool) -> None:
        self.num_classes, self.average, self.multilabel = num_classes, average, multilabel
        per_class = torch.zeros(num_classes, dtype=torch.int64)
        super().__init__(correct=per_class, targets=per_class, predictions=per_class)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count scores `[B, C]` against targets `[B]` or `[B, C]`."""
        check_scores(preds, self.num_classes)
        if self.multilabel:
            check_multi_hot(preds, target)
            predicted, wanted = as_probabilities(preds) > 0.5, target > 0
            self.correct += (predicted & wanted).sum(0)
            self.targets += wanted.sum(0)
            self.predictions += predicted.sum(0)
        else:
            check_classes(target, self.num_classes)
            best = preds.argmax(1)
            self.correct += torch.bincount(target[best == target], minlength=self.num_classes)
            self.targets += torch.bincount(target, minlength=self.num_classes)
            self.predictions += torch.bincount(best, minlength=self.num_classes)

    def compute(self) -> dict[str, Tensor]:
        """`{"top-1": F1}`."""
        correct, targets, predictions = self.merged("correct", "targets", "predictions")
        occurrences = targets + predictions  # 2 tp + fp + fn
        if self.average == "micro":
            return {"top-1": 2 * correct.sum().float() / occurrences.sum()}
        per_class = 2 * correct.float() / occurrences.clamp(min=1)
        return {"top-1": (per_class if self.multilabel else per_class[occurrences > 0]).mean()}


def check_multi_hot(preds: Tensor, target: Tensor) -> None:
    """Raise if the targets aren't multi-hot rows of the shape of the scores."""
    if target.shape != preds.shape:
        raise ValueError(f"expected multi-hot targets {tuple(preds.shape)}, got {tuple(target.shape)}")


def as_probabilities(preds: Tensor) -> Tensor:
    """The sigmoid of scores if any of them lies outside [0, 1], else the scores themselves."""
    outside = preds.numel() > 0 and (float(preds.min()) < 0 or float(preds.max()) > 1)
    return preds.sigmoid() if outside else preds


class AnyMatchAccuracy(Metric):
    """Fraction of samples with any of their labels among the k highest scores: keys `top-<k>` (ImageNet-ReaL).

    Targets are lists of class numbers, padded with -1: `[B, L]`. Samples without labels are left out.

    Source: Beyer et al. 2020, "Are we done with ImageNet?", section 4.
    """

    correct: Tensor
    count: Tensor

    def __init__(self, *, num_classes: int, ks: Sequence[int]) -> None:
        self.num_classes, self.ks = num_classes, tuple(ks)
        super().__init__(correct=torch.zeros(len(self.ks), dtype=torch.int64), count=torch.zeros((), dtype=torch.int64))

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count scores `[B, C]` against lists of class numbers `[B, L]`."""
        check_scores(preds, self.num_classes)
        if target.ndim != 2:
            raise ValueError(f"expected lists of class numbers [B, L], padded with -1, got {tuple(target.shape)}")
        labelled = (target >= 0).any(1)
        self.count += labelled.sum()
        # No class has the number -1: padding never matches.
        self.correct += torch.stack([(in_top_k(preds, target, k) & labelled).sum() for k in self.ks])

    def compute(self) -> dict[str, Tensor]:
        """`{"top-<k>": fraction}`."""
        correct, count = self.merged("correct", "count")
        return {f"top-{k}": c.float() / count for k, c in zip(self.ks, correct, strict=True)}


class GroupedAnyMatchAccuracy(Metric):
    """Any-match accuracy over all samples, key `top-1` whatever k is, and over each group of samples.

    Targets are sample numbers `[B]`; the data set maps them to labels and groups.

    Args:
        num_classes: C.
        k: number of guesses.
        mapped_targets: class numbers of each sample, padded with -1: array `[N, A]`.
        groupby_labels: name of a grouping -> array of N values; every value becomes a key of the result.
    """

    correct: Tensor
    count: Tensor

    def __init__(
        self, *, num_classes: int, k: int, mapped_targets: Any, groupby_labels: Mapping[str, Sequence[Any]]
    ) -> None:
        self.num_classes, self.k = num_classes, k
        self.mapped_targets = torch.as_tensor(mapped_targets)
        values = [list(map(str, labels)) for labels in groupby_labels.values()]
        self.keys = ["top-1", *dict.fromkeys(value for labels in values for value in labels)]
        number = {key: i for i, key in enumerate(self.keys)}
        # Which keys a sample counts for: [N, 1 + groupings].
        everything = [0] * len(self.mapped_targets)
        columns = [everything, *([number[value] for value in labels] for labels in values)]
        self.memberships = torch.tensor(columns).T
        counts = torch.zeros(len(self.keys), dtype=torch.int64)
        super().__init__(correct=counts, count=counts)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count scores `[B, C]` of the samples with these numbers `[B]`."""
        check_scores(preds, self.num_classes)
        samples = target.cpu()
        labels, groups = self.mapped_targets[samples].to(preds.device), self.memberships[samples].to(preds.device)
        labelled = (labels >= 0).any(1)
        hits = in_top_k(preds, labels, self.k) & labelled
        self.count += torch.bincount(groups[labelled].flatten(), minlength=len(self.keys))
        self.correct += torch.bincount(groups[hits].flatten(), minlength=len(self.keys))

    def compute(self) -> dict[str, Tensor]:
        """`{"top-1": fraction, <group>: fraction}`."""
        correct, count = self.merged("correct", "count")
        return dict(zip(self.keys, correct.float() / count, strict=True))


class MeanReciprocalRank(Metric):
    """Reciprocal rank of the target, averaged within classes, then over all classes (absent: 0): key `top-1`.

    The rank is the number of scores that are at least the target's: a tie costs.
    """

    total: Tensor
    count: Tensor

    def __init__(self, *, num_classes: int) -> None:
        self.num_classes = num_classes
        per_class = torch.zeros(num_classes)
        super().__init__(total=per_class, count=per_class)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count scores `[B, C]` against class numbers `[B]`."""
        check_scores(preds, self.num_classes)
        check_classes(target, self.num_classes)
        rank = (preds >= preds.gather(1, target[:, None])).sum(1)
        self.total.index_add_(0, target, 1.0 / rank)
        self.count += torch.bincount(target, minlength=self.num_classes)

    def compute(self) -> dict[str, Tensor]:
        """`{"top-1": mean reciprocal rank}`."""
        total, count = self.merged("total", "count")
        return {"top-1": (total / (count + 1e-6)).mean()}
