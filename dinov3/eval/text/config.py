"""Configurations of dino.txt: its training, and how evaluations name a model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dinov3.configs.config import load_mapping
from dinov3.eval.config import MISSING
from dinov3.eval.text.dinotxt_model import DINOTxtConfig

_PLACEHOLDER = re.compile(r"<[^<>]+>")

# Accepted from published files; nothing reads them.
UNUSED = ("dtype_str", "eval_only", "eval_pretrained_weights", "output_dict", "profiling", "init_logit_bias")


@dataclass
class TextTrainConfig(DINOTxtConfig):
    """Configuration of the training: the model, then how it is trained."""

    train_dataset_str: str = MISSING
    """Dataset string; items are (image, caption)."""
    eval_dataset_str: str | None = None
    """Dataset string of captions; with it, periodic evaluations measure retrieval. null: they export only."""
    batch_size: int = 256
    """Pairs per process."""
    num_workers: int = 10
    """Of the data loader, per process."""
    dataset_use_cache: bool = False
    """Every process keeps to its own share of the samples."""
    dataset_shuffle: bool = False
    """Random order. Otherwise samples come in the order of the data set, as in the published training."""
    max_iteration: int = 50000
    warmup_length: int = 2000
    """Iterations of the linear warm-up."""
    lr: float = 7e-4
    lr_scheduler_type: str = "cosine"
    """Only cosine."""
    weight_decay: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    vision_model_use_gram_loss: bool = False
    vision_model_gram_loss_weight: float = 1.0
    vision_model_patch_sampling_rate_for_gram_loss: float = 1.0
    """Part of the patches that the Gram loss compares."""
    vision_model_normalize_patch_tokens_for_gram_loss: bool = True
    checkpointing_period: int = 500
    """Iterations between checkpoints."""
    max_checkpoints_to_keep: int | None = 5
    """null: all."""
    eval_freq: int = 5000
    """Iterations between exports and evaluations; 0: only in the end."""
    gc_freq: int = 100
    """Iterations between collections of garbage."""
    seed: int = 11
    no_resume: bool = False
    """Begin anew instead of going on from the newest checkpoint."""
    use_fsdp: bool = True
    """Share the parameters among the processes."""
    do_compile: bool = True
    use_ac: bool = True
    """Activation checkpointing of the trained blocks."""
    use_full_ac: bool = False
    """Recompute everything, instead of keeping results of matrix products and attention."""
    use_cuda_graphs: bool = False
    param_dtype_str: str = "bf16"
    """To compute in, with FSDP."""
    reduce_dtype_str: str = "fp32"
    """To average gradients in, with FSDP."""
    dtype_str: str = "bf16"
    eval_only: bool | None = None
    eval_pretrained_weights: str | None = None
    output_dict: bool | None = None
    profiling: bool | None = None
    output_dir: str = ""


@dataclass
class TextModelConfig:
    """A dino.txt model: an entry of the hub, or what a training left."""

    hub: str | None = None
    """Name of a hub model, such as `dinov3_vitl16_dinotxt_tet1280d20h24l`."""
    weights: str | None = None
    """Of the vision head and the text tower. null: the released ones, with `hub`."""
    backbone_weights: str | None = None
    """Of the vision backbone. null: the released ones, with `hub`; those of the configuration, with `config_file`."""
    vocabulary: str | None = None
    """Of the tokenizer. null: wherever it can be found."""
    config_file: str | None = None
    """`clip_model_config.yaml` of a training. Excludes `hub`."""


def model_config_of(config: Any) -> DINOTxtConfig:
    """The part of a configuration that describes the model."""
    return DINOTxtConfig(**{field.name: getattr(config, field.name) for field in fields(DINOTxtConfig)})


def load_model_config(path: str | Path) -> DINOTxtConfig:
    """The model configuration that a training wrote (`clip_model_config.yaml`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: it has other keys, or lacks `embed_dim`.
    """
    values = load_mapping(path)
    known = {field.name for field in fields(DINOTxtConfig)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{path} is no model configuration of dino.txt: it has {', '.join(unknown)}")
    if "embed_dim" not in values:
        raise ValueError(f"{path} is no model configuration of dino.txt: it lacks embed_dim")
    return DINOTxtConfig(**values)


def check_placeholders(values: Mapping[str, Any]) -> None:
    """Refuse values like `<PATH TO WEIGHTS>` that were meant to be replaced.

    Raises:
        ValueError: there are some; the message names them.
    """
    left = [key for key, value in values.items() if isinstance(value, str) and _PLACEHOLDER.search(value)]
    if left:
        raise ValueError(
            f"placeholders are left in the configuration ({', '.join(f'{key}={values[key]}' for key in left)}). Give "
            f"values of your own in the file, or as key=value on the command line: {', '.join(left)}"
        )


def check_training(config: TextTrainConfig) -> None:
    """Refuse what can't be trained, before anything is built.

    Raises:
        ValueError: impossible values; the message says which.
    """
    check_placeholders(vars(config))
    if config.lr_scheduler_type != "cosine":
        raise ValueError(f"lr_scheduler_type={config.lr_scheduler_type}: the only schedule is cosine")
    if not 0 <= config.warmup_length <= config.max_iteration:
        raise ValueError(
            f"warmup_length={config.warmup_length} must lie between 0 and max_iteration={config.max_iteration}"
        )
    for name in ("batch_size", "max_iteration", "checkpointing_period", "gc_freq"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.max_checkpoints_to_keep is not None and config.max_checkpoints_to_keep < 1:
        raise ValueError("max_checkpoints_to_keep must be at least 1: the training goes on from the newest one")
