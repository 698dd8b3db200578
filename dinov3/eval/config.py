"""Configuration that the classification evaluations share. Each adds its own `TrainConfig` and `EvalConfig`."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from dinov3.configs.model import ModelConfig


class LossType(Enum):
    """Training losses of classifiers."""

    CROSS_ENTROPY = "cross_entropy"
    BINARY_CROSS_ENTROPY = "binary_cross_entropy"


@dataclass
class TransformConfig:
    """Sizes of the evaluation transform, in pixels."""

    resize_size: int = 256
    """Of the shorter side."""
    crop_size: int = 224
    """Of the centre crop."""


@dataclass
class FewShotConfig:
    """Evaluation with a part of the train set."""

    enable: bool = False
    k_or_percent: float | None = None
    """Samples per class if 1 or more, else the fraction of each class."""
    n_tries: int = 1
    """Selections to average over."""


__all__ = ["MISSING", "FewShotConfig", "LossType", "ModelConfig", "TransformConfig"]
