"""The table of metric types, and how each is built."""

from collections.abc import Sequence
from enum import Enum
from typing import Any

from dinov3.eval.metrics.base import Metric
from dinov3.eval.metrics.classification import (
    AnyMatchAccuracy,
    F1Score,
    GroupedAnyMatchAccuracy,
    MeanReciprocalRank,
    TopKAccuracy,
)
from dinov3.eval.metrics.curves import AUROC, MultilabelAveragePrecision
from dinov3.eval.metrics.imagenet_c import CORRUPTION_TYPES, ImageNet_C_Metric


class ClassificationMetricType(Enum):
    """Metrics by the names that configurations use; `str()` gives the value."""

    MEAN_ACCURACY = "mean_accuracy"
    MEAN_RECALL = "mean_recall"
    MEAN_PER_CLASS_ACCURACY = "mean_per_class_accuracy"
    MEAN_PER_CLASS_RECALL = "mean_per_class_recall"
    PER_CLASS_ACCURACY = "per_class_accuracy"
    MEAN_MULTICLASS_F1 = "mean_multiclass_f1"
    MEAN_PER_CLASS_MULTICLASS_F1 = "mean_per_class_multiclass_f1"
    MEAN_MULTILABEL_F1 = "mean_multilabel_f1"
    MEAN_PER_CLASS_MULTILABEL_F1 = "mean_per_class_multilabel_f1"
    AUROC = "auroc"
    MACRO_MULTILABEL_AVERAGE_PRECISION = "macro_multilabel_average_precision"
    MEAN_AVERAGE_PRECISION_VOC_2007 = "map_voc2007"
    ANY_MATCH_ACCURACY = "any_match_accuracy"
    GROUPBY_ANY_MATCH_ACCURACY_1 = "groupby_any_match_accuracy_1"
    GROUPBY_ANY_MATCH_ACCURACY_5 = "groupby_any_match_accuracy_5"
    MACRO_AVERAGED_MEAN_RECIPROCAL_RANK = "macro_averaged_mean_reciprocal_rank"
    IMAGENET_C_METRIC = "imagenet_c_metric"

    def __str__(self) -> str:
        return self.value

    @property
    def averaging_method(self) -> str | None:
        """`"micro"` (over samples), `"macro"` (over classes), `"none"` (a vector), or None where it doesn't apply."""
        return _AVERAGING.get(self)

    @property
    def is_topk_accuracy_metric(self) -> bool:
        """Whether this is a top-k accuracy."""
        return self in _TOPK_ACCURACY

    @property
    def is_topk_recall_metric(self) -> bool:
        """Whether this is a top-k recall (for single labels the same number as the accuracy)."""
        return self in _TOPK_RECALL

    @property
    def is_multilabel(self) -> bool:
        """Whether targets hold several labels per sample.

        As in the published table, in which MACRO_MULTILABEL_AVERAGE_PRECISION is missing (golden case `metric_types`).
        """
        return self in _MULTILABEL


_T = ClassificationMetricType
_TOPK_ACCURACY = frozenset({_T.MEAN_ACCURACY, _T.MEAN_PER_CLASS_ACCURACY, _T.PER_CLASS_ACCURACY})
_TOPK_RECALL = frozenset({_T.MEAN_RECALL, _T.MEAN_PER_CLASS_RECALL})
_MULTILABEL = frozenset(
    {
        _T.MEAN_MULTILABEL_F1,
        _T.MEAN_PER_CLASS_MULTILABEL_F1,
        _T.MEAN_AVERAGE_PRECISION_VOC_2007,
        _T.ANY_MATCH_ACCURACY,
        _T.GROUPBY_ANY_MATCH_ACCURACY_1,
        _T.GROUPBY_ANY_MATCH_ACCURACY_5,
    }
)
_AVERAGING = {
    _T.MEAN_ACCURACY: "micro",
    _T.MEAN_RECALL: "micro",
    _T.MEAN_PER_CLASS_ACCURACY: "macro",
    _T.MEAN_PER_CLASS_RECALL: "macro",
    _T.PER_CLASS_ACCURACY: "none",
    _T.MEAN_MULTICLASS_F1: "micro",
    _T.MEAN_PER_CLASS_MULTICLASS_F1: "macro",
    _T.MEAN_MULTILABEL_F1: "micro",
    _T.MEAN_PER_CLASS_MULTILABEL_F1: "macro",
}


def build_classification_metric(
    metric_type: ClassificationMetricType,
    *,
    num_classes: int,
    ks: Sequence[int] | None = None,
    dataset: Any = None,
) -> Metric:
    """The metric of a type; its `compute()` gives a dictionary of tensors with the keys that the type has.

    Args:
        metric_type: which metric.
        num_classes: number of classes, or of labels of multi-label data.
        ks: of top-k metrics; default (1, 5), or (1,) with fewer than 5 classes.
        dataset: needed by the group-by metrics, for its `get_mapped_targets()` and `get_groupby_labels()`; ImageNet-C's
            takes the names of the corruptions from its `corruption_types`, if it has them.
    """
    if ks is None:
        ks = (1, 5) if num_classes >= 5 else (1,)
    average = metric_type.averaging_method or ""
    if metric_type.is_topk_accuracy_metric or metric_type.is_topk_recall_metric:
        return TopKAccuracy(num_classes=num_classes, ks=ks, average=average)
    match metric_type:
        case _T.MEAN_MULTICLASS_F1 | _T.MEAN_PER_CLASS_MULTICLASS_F1:
            return F1Score(num_classes=num_classes, average=average, multilabel=False)
        case _T.MEAN_MULTILABEL_F1 | _T.MEAN_PER_CLASS_MULTILABEL_F1:
            return F1Score(num_classes=num_classes, average=average, multilabel=True)
        case _T.AUROC:
            return AUROC(num_classes=num_classes)
        case _T.MACRO_MULTILABEL_AVERAGE_PRECISION:
            return MultilabelAveragePrecision(num_labels=num_classes)
        case _T.MEAN_AVERAGE_PRECISION_VOC_2007:
            return MultilabelAveragePrecision(num_labels=num_classes, voc2007=True)
        case _T.ANY_MATCH_ACCURACY:
            return AnyMatchAccuracy(num_classes=num_classes, ks=ks)
        case _T.GROUPBY_ANY_MATCH_ACCURACY_1 | _T.GROUPBY_ANY_MATCH_ACCURACY_5:
            k = 1 if metric_type is _T.GROUPBY_ANY_MATCH_ACCURACY_1 else 5
            return _build_grouped(metric_type, num_classes, k, dataset)
        case _T.MACRO_AVERAGED_MEAN_RECIPROCAL_RANK:
            return MeanReciprocalRank(num_classes=num_classes)
        case _T.IMAGENET_C_METRIC:
            return ImageNet_C_Metric(getattr(dataset, "corruption_types", CORRUPTION_TYPES))
    raise ValueError(f"unknown metric type {metric_type!r}; known: {', '.join(_T.__members__)}")


def _build_grouped(metric_type: ClassificationMetricType, num_classes: int, k: int, dataset: Any) -> Metric:
    missing = [name for name in ("get_mapped_targets", "get_groupby_labels") if not hasattr(dataset, name)]
    if missing:
        raise ValueError(
            f"{metric_type.name} needs a data set with get_mapped_targets() and get_groupby_labels(): "
            f"{type(dataset).__name__} lacks {' and '.join(missing)}"
        )
    return GroupedAnyMatchAccuracy(
        num_classes=num_classes,
        k=k,
        mapped_targets=dataset.get_mapped_targets(),
        groupby_labels=dataset.get_groupby_labels(),
    )
