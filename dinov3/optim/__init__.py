"""What an optimizer is told: schedules (functions of the iteration) and parameter groups."""

from dinov3.optim.param_groups import (
    fuse_params_groups,
    get_params_groups_with_decay,
    get_params_groups_with_decay_fsdp,
    get_vit_lr_decay_rate,
    remove_fsdp_compile_names,
)
from dinov3.optim.schedules import (
    CosineScheduler,
    Schedule,
    TrainingSchedules,
    cosine_training_schedules,
    epochs_to_iterations,
    frozen_at_start,
    linear_warmup_cosine_decay,
    lr_scale,
    warmup_cosine_from_epochs,
)

__all__ = [
    "CosineScheduler",
    "Schedule",
    "TrainingSchedules",
    "cosine_training_schedules",
    "epochs_to_iterations",
    "frozen_at_start",
    "fuse_params_groups",
    "get_params_groups_with_decay",
    "get_params_groups_with_decay_fsdp",
    "get_vit_lr_decay_rate",
    "linear_warmup_cosine_decay",
    "lr_scale",
    "remove_fsdp_compile_names",
    "warmup_cosine_from_epochs",
]
