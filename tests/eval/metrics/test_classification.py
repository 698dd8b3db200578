"""Counting metrics: by hand, against scikit-learn, and what they refuse."""

from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor

from dinov3.eval.metrics import ClassificationMetricType, Metric, accuracy, build_classification_metric
from dinov3.eval.metrics.classification import AnyMatchAccuracy, MeanReciprocalRank, TopKAccuracy

T = ClassificationMetricType


def _result(metric: Metric, preds: Tensor, target: Tensor, pieces: int = 3) -> dict[str, Any]:
    for p, t in zip(preds.tensor_split(pieces), target.tensor_split(pieces), strict=True):
        metric.update(p, t)
    return {key: value.tolist() for key, value in metric.compute().items()}


def _scores(rows: list[int], classes: int) -> Tensor:
    """Scores whose order is fixed by hand: class `rows[i]` is the best of row i, then ascending classes."""
    scores = -torch.arange(classes, dtype=torch.float32).repeat(len(rows), 1)
    scores[range(len(rows)), rows] = 1.0
    return scores


def test_averages_by_hand() -> None:
    preds, target = _scores([0, 0, 1, 3], 5), torch.tensor([0, 1, 1, 1])
    options: Any = dict(num_classes=5, ks=(1, 2))
    micro = _result(TopKAccuracy(average="micro", **options), preds, target)
    # Second guesses are 1, 1, 0, 0.
    assert micro == {"top-1": 0.5, "top-2": 0.75}
    macro = _result(TopKAccuracy(average="macro", **options), preds, target)
    # Class 3 is predicted but never a target: it counts as 0 for k = 1 and not at all for k = 2.
    assert macro["top-1"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert macro["top-2"] == pytest.approx((1 + 2 / 3) / 2)
    vector = _result(TopKAccuracy(average="none", **options), preds, target)
    assert vector["top-1"] == pytest.approx([1, 1 / 3, 0, 0, 0])


def test_metrics_start_anew_after_a_reset() -> None:
    metric = TopKAccuracy(num_classes=3, ks=(1,), average="micro")
    _result(metric, _scores([0, 1, 2], 3), torch.tensor([1, 2, 0]))
    metric.reset()
    assert _result(metric, _scores([0, 1, 2], 3), torch.tensor([0, 1, 2])) == {"top-1": 1.0}


def test_k_of_equal_hits_in_the_first_batch_stay_apart() -> None:
    metric = build_classification_metric(T.MEAN_PER_CLASS_ACCURACY, num_classes=5)
    metric.update(_scores([0, 1], 5), torch.tensor([0, 1]))
    metric.update(_scores([0, 1], 5), torch.tensor([1, 0]))
    assert {key: value.item() for key, value in metric.compute().items()} == {"top-1": 0.5, "top-5": 1.0}


@pytest.mark.parametrize("metric_type", [T.MEAN_MULTICLASS_F1, T.MEAN_PER_CLASS_MULTICLASS_F1])
def test_f1_of_classes(metric_type: T) -> None:
    preds, target = torch.randn(200, 7), torch.randint(5, (200,))
    preds[:, 6] = -100  # a class that nobody sees
    got = _result(build_classification_metric(metric_type, num_classes=7), preds, target)
    want = f1_score(target, preds.argmax(1), average=metric_type.averaging_method)
    assert got["top-1"] == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("metric_type", [T.MEAN_MULTILABEL_F1, T.MEAN_PER_CLASS_MULTILABEL_F1])
@pytest.mark.parametrize("logits", [True, False])
def test_f1_of_labels(metric_type: T, logits: bool) -> None:
    preds, target = torch.randn(200, 4), torch.randint(2, (200, 4))
    got = _result(build_classification_metric(metric_type, num_classes=4), preds if logits else preds.sigmoid(), target)
    want = f1_score(target, preds > 0, average=metric_type.averaging_method)
    assert got["top-1"] == pytest.approx(want, abs=1e-6)


def test_any_match_ignores_empty_lists_and_leaves_targets_alone() -> None:
    preds = _scores([2, 0, 1, 3], 6)
    target = torch.tensor([[1, 2], [3, -1], [-1, -1], [5, 4]])
    before = target.clone()
    assert _result(AnyMatchAccuracy(num_classes=6, ks=(1, 5)), preds, target) == {
        "top-1": pytest.approx(1 / 3),
        "top-5": 1.0,
    }
    assert torch.equal(target, before)


def test_groups_have_accuracies_of_their_own() -> None:
    class Places:
        def get_mapped_targets(self) -> Any:
            return [[0, 1], [1, -1], [2, -1], [-1, -1]]

        def get_groupby_labels(self) -> Any:
            return {"place": ["north", "north", "south", "south"], "size": ["big", "small", "small", "small"]}

    metric = build_classification_metric(T.GROUPBY_ANY_MATCH_ACCURACY_1, num_classes=3, dataset=Places())
    got = _result(metric, _scores([1, 0, 2, 2], 3), torch.arange(4), pieces=1)
    assert got == {"top-1": pytest.approx(2 / 3), "north": 0.5, "south": 1.0, "big": 1.0, "small": 0.5}
    with pytest.raises(ValueError, match=r"get_mapped_targets\(\) and .*: NoneType lacks"):
        build_classification_metric(T.GROUPBY_ANY_MATCH_ACCURACY_5, num_classes=3)


def test_a_tie_costs_reciprocal_rank() -> None:
    preds = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.3]])
    got = _result(MeanReciprocalRank(num_classes=3), preds, torch.tensor([0, 2]), pieces=1)
    assert got["top-1"] == pytest.approx((1 / 2 + 0 + 1) / 3, abs=1e-5)


def test_accuracy_in_percent() -> None:
    preds, target = _scores([0, 0, 1, 3], 5), torch.tensor([0, 1, 1, 1])
    assert [a.item() for a in accuracy(preds, target, topk=(1, 2))] == [50.0, 75.0]


@pytest.mark.parametrize(
    ("metric_type", "preds", "target", "message"),
    [
        (T.MEAN_ACCURACY, torch.zeros(2, 4), torch.zeros(2).long(), r"expected scores \[B, 5\], got \(2, 4\)"),
        (
            T.MEAN_ACCURACY,
            torch.zeros(2, 5),
            torch.tensor([0, 5]),
            "from 0 to 4, got 0 to 5: do the train and the test",
        ),
        (T.MEAN_ACCURACY, torch.zeros(2, 5), torch.zeros(2, 5).long(), "needs a multi-label metric"),
        (T.MEAN_MULTILABEL_F1, torch.zeros(2, 5), torch.zeros(2).long(), r"multi-hot targets \(2, 5\), got \(2,\)"),
        (T.ANY_MATCH_ACCURACY, torch.zeros(2, 5), torch.zeros(2).long(), "padded with -1"),
        (T.IMAGENET_C_METRIC, torch.zeros(2, 5), torch.zeros(2).long(), "corruption, severity"),
        (T.AUROC, torch.zeros(2, 5), torch.zeros(2, 5).long(), "one class number per sample"),
    ],
)
def test_wrong_scores_and_targets_are_named(metric_type: T, preds: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_classification_metric(metric_type, num_classes=5).update(preds, target)


@pytest.mark.parametrize("ks", [(), (0,), (6,)])
def test_impossible_numbers_of_guesses(ks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="needs k from 1 to 5"):
        build_classification_metric(T.MEAN_ACCURACY, num_classes=5, ks=ks)


@pytest.mark.parametrize("metric_type", list(T))
def test_empty_batches_count_nothing(metric_type: T) -> None:
    class Groups:
        def get_mapped_targets(self) -> Any:
            return [[i % 5] for i in range(12)]

        def get_groupby_labels(self) -> Any:
            return {}

    widths = {T.ANY_MATCH_ACCURACY: (2,), T.IMAGENET_C_METRIC: (3,), T.MEAN_AVERAGE_PRECISION_VOC_2007: (5,)}
    width = (5,) if "MULTILABEL" in metric_type.name else widths.get(metric_type, ())
    preds, target = torch.randn(12, 5), torch.ones(12, *width, dtype=torch.int64)
    results = []
    for with_empty in (False, True):
        metric = build_classification_metric(metric_type, num_classes=5, dataset=Groups())
        if with_empty:
            metric.update(preds[:0], target[:0])
        metric.update(preds, target)
        results.append(metric.compute())
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.slow  # torchmetrics takes 10 s to import
@pytest.mark.filterwarnings("ignore:No positive samples found:UserWarning")  # torchmetrics, of the absent label
def test_agrees_with_torchmetrics() -> None:
    from torchmetrics import classification as tm

    preds, target, hot = torch.randn(300, 8), torch.randint(7, (300,)), torch.randint(2, (300, 8))
    hot[:, 3] = 0
    per_class = dict(num_classes=8)
    pairs: list[tuple[T, Any, Tensor]] = [
        (T.MEAN_ACCURACY, tm.MulticlassAccuracy(average="micro", top_k=1, **per_class), target),
        (T.MEAN_PER_CLASS_ACCURACY, tm.MulticlassAccuracy(average="macro", top_k=1, **per_class), target),
        (T.PER_CLASS_ACCURACY, tm.MulticlassAccuracy(average=None, top_k=1, **per_class), target),
        (T.MEAN_MULTICLASS_F1, tm.MulticlassF1Score(average="micro", **per_class), target),
        (T.MEAN_PER_CLASS_MULTICLASS_F1, tm.MulticlassF1Score(average="macro", **per_class), target),
        (T.MEAN_MULTILABEL_F1, tm.MultilabelF1Score(8, average="micro"), hot),
        (T.MEAN_PER_CLASS_MULTILABEL_F1, tm.MultilabelF1Score(8, average="macro"), hot),
        (T.MACRO_MULTILABEL_AVERAGE_PRECISION, tm.MultilabelAveragePrecision(8, average="macro"), hot),
    ]
    for metric_type, theirs, wanted in pairs:
        metric = build_classification_metric(metric_type, num_classes=8)
        metric.update(preds, wanted)
        torch.testing.assert_close(metric.compute()["top-1"], theirs(preds, wanted), atol=1e-5, rtol=1e-5)
    five = build_classification_metric(T.MEAN_PER_CLASS_ACCURACY, num_classes=8)
    five.update(preds, target)
    theirs = tm.MulticlassAccuracy(average="macro", top_k=5, **per_class)
    torch.testing.assert_close(five.compute()["top-5"], theirs(preds, target))
