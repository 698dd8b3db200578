"""Areas under curves and average precisions, against scikit-learn and by hand."""

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from dinov3.eval.metrics.curves import AUROC, MultilabelAveragePrecision


def _with_ties(*shape: int) -> Tensor:
    return torch.randint(6, shape) / 5


def test_area_under_roc_with_tied_scores() -> None:
    preds, target = _with_ties(120, 4), torch.randint(4, (120,))
    metric = AUROC(num_classes=4)
    for rows in torch.arange(120).split(50):
        metric.update(preds[rows], target[rows])
    want = sum(roc_auc_score(target == c, preds[:, c]) for c in range(4)) / 4
    assert metric.compute()["top-1"].item() == pytest.approx(want, abs=1e-6)


def test_an_absent_class_has_no_area() -> None:
    metric = AUROC(num_classes=3)
    metric.update(torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]]), torch.tensor([0, 1]))
    assert metric.compute()["top-1"].item() == pytest.approx(2 / 3)


def test_scores_beyond_the_unit_interval_are_logits() -> None:
    logits, target = torch.randn(80, 3) * 3, torch.randint(3, (80,))
    results = []
    for scores in (logits, logits.softmax(1)):
        metric = AUROC(num_classes=3)
        metric.update(scores, target)
        results.append(metric.compute()["top-1"].item())
    assert results[0] == pytest.approx(results[1], abs=1e-6)


def test_average_precision_with_tied_scores() -> None:
    preds, target = _with_ties(150, 5), torch.randint(2, (150, 5))
    metric = MultilabelAveragePrecision(num_labels=5)
    metric.update(preds, target)
    assert metric.compute()["top-1"].item() == pytest.approx(average_precision_score(target, preds), abs=1e-6)


def test_a_label_without_samples_has_no_precision() -> None:
    metric = MultilabelAveragePrecision(num_labels=2)
    metric.update(torch.tensor([[0.9, 0.4], [0.1, 0.3]]), torch.tensor([[1, 0], [0, 0]]))
    assert metric.compute()["top-1"].item() == pytest.approx(0.5)


def test_voc2007_takes_the_largest_precision_beyond_each_recall_level() -> None:
    # Ordered by score: hit, miss, hit, miss -> precision 1 up to recall 0.5, then 2/3.
    preds, target = torch.tensor([[0.9], [0.8], [0.7], [0.6]]), torch.tensor([[1], [0], [1], [0]])
    metric = MultilabelAveragePrecision(num_labels=1, voc2007=True)
    metric.update(preds, target)
    assert metric.compute()["top-1"].item() == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_nothing_to_compute_is_an_error() -> None:
    with pytest.raises(ValueError, match="AUROC: no sample was counted"):
        AUROC(num_classes=3).compute()
