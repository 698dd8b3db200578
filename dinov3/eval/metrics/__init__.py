"""Metrics of the classification evaluations.

`build_classification_metric` makes one from its type; every metric has `update(preds, target)`, `compute() -> {key:
tensor}`, `reset()` and `to(device)` (`base.Metric`). Counting metrics are in `classification.py`, metrics of whole
score curves in `curves.py`, the mean corruption error in `imagenet_c.py`.
"""

from dinov3.eval.metrics.base import Metric
from dinov3.eval.metrics.builder import ClassificationMetricType, build_classification_metric
from dinov3.eval.metrics.classification import accuracy

__all__ = ["ClassificationMetricType", "Metric", "accuracy", "build_classification_metric"]
