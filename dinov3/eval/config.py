"""Configuration that the classification evaluations share. Each adds its own `TrainConfig` and `EvalConfig`."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING


class LossType(Enum):
    """Training losses of classifiers."""

    CROSS_ENTROPY = "cross_entropy"
    BINARY_CROSS_ENTROPY = "binary_cross_entropy"


@dataclass
class ModelConfig:
    """The frozen model: a training's configuration and weights, or an entry of the hub."""

    config_file: str | None = None
    """Configuration of the training, YAML."""
    pretrained_weights: str | None = None
    """Weights: a file or a checkpoint directory. None or "": random, with `config_file`; the released ones, with
    `dino_hub`."""
    dino_hub: str | None = None
    """Name of a hub model, such as `dinov3_vitl16`. Excludes `config_file`."""


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
