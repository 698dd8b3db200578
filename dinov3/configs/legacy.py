"""The one table of keys that published configuration files carry and that nothing reads.

They are accepted, with one log line that lists them. Some are part of the published defaults, and stay there: code of
others may read them from `config.yaml`.
"""

from collections.abc import Mapping
from typing import Any

# key -> published default.
LEGACY_DEFAULTS: dict[str, Any] = {
    "MODEL.DEVICE": "cuda",  # as published; nothing reads it, devices are chosen by what is there
    "MODEL.WEIGHTS": "",
    "MODEL.DTYPE": "float32",
    "dino.head_norm_last_layer": False,
    "dino.koleo_distributed_loss_group_data": True,
    "dino.force_weight_norm": False,
    "ibot.force_masking_even_with_zero_weight": False,
    "ibot.head_norm_last_layer": False,
    "train.data_config": None,
    "train.saveckp_freq": 20,
    "train.monitor_gradient_norm": False,
    "train.chunk_schedule": [],
    "train.use_teacher_head": True,
    "train.learn_from_teacher_tokens": False,
    "student.pos_embed_type": "rope",
    "teacher.in_chans": 3,
    "hrft.enabled": False,
    "hrft.checkpoint_path": "",
    "optim.optimizer": "adamw",
    "optim.dump_fsdp_weights_path": "",
    "evaluation.low_freq_every": 5,
    "evaluation.config_files.high_freq": "benchmark_high_frequency.yaml",
    "evaluation.config_files.low_freq": "benchmark_low_frequency.yaml",
}

# Why nothing reads them: reason -> keys. Keys of published recipes without a default stand here alone.
LEGACY_REASONS: dict[str, tuple[str, ...]] = {
    "the accelerator is used if there is one, and compute_precision names the dtypes": ("MODEL.DEVICE", "MODEL.DTYPE"),
    "--eval-only exports the newest checkpoint": ("MODEL.WEIGHTS",),
    "last layers are plain linear layers, without weight norm": (
        "dino.head_norm_last_layer",
        "dino.force_weight_norm",
        "ibot.head_norm_last_layer",
    ),
    "never had an effect in the published code": (
        "dino.koleo_distributed_loss_group_data",
        "ibot.force_masking_even_with_zero_weight",
        "train.use_teacher_head",
        "train.learn_from_teacher_tokens",
        "train.chunk_schedule",
        "hrft.enabled",
        "hrft.checkpoint_path",
    ),
    "train.dataset_path names the data": ("train.data_config",),
    "the section checkpointing says when to save": ("train.saveckp_freq", "optim.dump_fsdp_weights_path"),
    "gradient norms are always logged when gradients are clipped": ("train.monitor_gradient_norm",),
    "positions are always RoPE": (
        "student.pos_embed_type",
        "student.pos_embed_grid_size",
        "student.pos_embed_rope_gamma",
        "student.pos_embed_rope_init_multi_frequencies",
        "student.cls_pos_embedding",
        "student.reg_pos_embedding",
        "student.multiple_pos_embeddings",
        "student.sin_cos_embeddings",
        "student.fourier_embeddings",
        "student.fourier_encoding_dim",
        "student.interpolate_antialias",
        "student.interpolate_offset",
    ),
    "the teacher has the student's architecture": ("teacher.in_chans",),
    "the optimizer is AdamW": ("optim.optimizer",),
    "evaluations are run by their own commands, and evaluation.online_knn during the training": (
        "evaluation.low_freq_every",
        "evaluation.config_files.high_freq",
        "evaluation.config_files.low_freq",
    ),
    "of experiments that are not part of the published code": (
        "coding_rate_loss.use_cls_loss",
        "coding_rate_loss.cls_loss_weight",
        "coding_rate_loss.use_masked_patches_loss",
        "coding_rate_loss.masked_patches_loss_weight",
        "coding_rate_loss.epsilon",
        "student.mask_attention",
        "student.mask_register_attention",
        "student.patch_drop",
        "train.cell_augmentation",
        "train.cell_augmentation_type",
    ),
    "fixed by the architecture": (
        "student.block_chunks",
        "student.drop_path_shape",
        "student.drop_path_uniform",
        "student.init_std_cls",
        "student.init_std_reg",
        "student.rescale_weights_by_layer_id",
    ),
}

LEGACY_KEYS: frozenset[str] = frozenset(key for keys in LEGACY_REASONS.values() for key in keys) - set(LEGACY_DEFAULTS)


def is_legacy(key: str) -> bool:
    """Whether a dotted key is in the table."""
    return key in LEGACY_DEFAULTS or key in LEGACY_KEYS


def flatten(key: str, value: Any) -> dict[str, Any]:
    """Dotted key -> value of all leaves below `key`."""
    if not isinstance(value, Mapping) or not value:
        return {key: value}
    return {leaf: v for name, below in value.items() for leaf, v in flatten(f"{key}.{name}", below).items()}


def add_legacy_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Put the defaults of legacy keys into a nested configuration, in place, and return it."""
    for key, value in LEGACY_DEFAULTS.items():
        *sections, name = key.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, {})
        node.setdefault(name, list(value) if isinstance(value, list) else value)
    return config
