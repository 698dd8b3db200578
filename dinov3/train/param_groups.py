"""Moved to `dinov3.optim.param_groups`."""

from dinov3.optim.param_groups import (
    fuse_params_groups,
    get_params_groups_with_decay,
    get_params_groups_with_decay_fsdp,
    get_vit_lr_decay_rate,
    remove_fsdp_compile_names,
)

__all__ = [
    "fuse_params_groups",
    "get_params_groups_with_decay",
    "get_params_groups_with_decay_fsdp",
    "get_vit_lr_decay_rate",
    "remove_fsdp_compile_names",
]
