"""Configuration of a frozen model: which network an evaluation or the training of a head stands on."""

from dataclasses import dataclass


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
