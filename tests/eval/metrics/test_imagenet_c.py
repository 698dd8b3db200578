"""The mean corruption error."""

import pytest
import torch

from dinov3.eval.metrics import ClassificationMetricType, build_classification_metric
from dinov3.eval.metrics.imagenet_c import ALEXNET_ERRORS, CORRUPTION_TYPES, ImageNet_C_Metric


def test_alexnet_has_a_mean_corruption_error_of_one() -> None:
    metric = ImageNet_C_Metric()
    metric.total = torch.full((95,), 1e6)
    metric.tp = metric.total * (1 - torch.tensor(list(ALEXNET_ERRORS.values())).flatten())
    assert metric.compute()["top-1"].item() == pytest.approx(1.0, abs=1e-6)
    assert len(CORRUPTION_TYPES) == 19
    assert list(CORRUPTION_TYPES) == sorted(CORRUPTION_TYPES)


def test_absent_severities_and_corruptions_are_left_out() -> None:
    metric = ImageNet_C_Metric(corruption_types=["fog", "snow"])
    preds = torch.eye(3)[[0, 1, 2, 0]]
    rows = torch.tensor([[0, 0, 1], [1, 0, 1], [0, 1, 5], [0, 1, 5]])  # (class, corruption, severity)
    metric.update(preds, rows)
    fog, snow = 0.0 / ALEXNET_ERRORS["FOG"][0], 0.5 / ALEXNET_ERRORS["SNOW"][4]
    assert metric.compute()["top-1"].item() == pytest.approx((fog + snow) / 2)


def test_the_names_are_those_of_the_data_set() -> None:
    class FogAndSnow:
        corruption_types = ("fog", "snow")

    metric = build_classification_metric(
        ClassificationMetricType.IMAGENET_C_METRIC, num_classes=3, dataset=FogAndSnow()
    )
    metric.update(torch.eye(3)[[0]], torch.tensor([[1, 1, 5]]))
    assert metric.compute()["top-1"].item() == pytest.approx(1 / ALEXNET_ERRORS["SNOW"][4])


def test_unknown_corruptions_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown corruptions \['rain'\]"):
        ImageNet_C_Metric(corruption_types=["fog", "rain"])
