"""Checkpoints of a training and weights of models.

`checkpointer.py` saves and loads the state of a run, `directories.py` finds, keeps and deletes checkpoints,
`initialize.py` puts weights into models, sharded or not; `weights.py` is the one reader of weight files (it needs torch
alone: names of the other modules are loaded when they are first used).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinov3.checkpointer.checkpointer import load_checkpoint, save_checkpoint
    from dinov3.checkpointer.directories import (
        CheckpointRetentionPolicy,
        cleanup_checkpoint,
        find_all_checkpoints,
        find_latest_checkpoint,
        keep_checkpoint_copy,
        keep_last_n_checkpoints,
    )
    from dinov3.checkpointer.dont_save import register_dont_save_hooks
    from dinov3.checkpointer.initialize import init_fsdp_model_from_checkpoint, init_model_from_checkpoint_for_evals
    from dinov3.checkpointer.random_state import RandomState
    from dinov3.checkpointer.saver import CheckpointSaver

_HOMES = {
    "CheckpointRetentionPolicy": "directories",
    "CheckpointSaver": "saver",
    "RandomState": "random_state",
    "cleanup_checkpoint": "directories",
    "find_all_checkpoints": "directories",
    "find_latest_checkpoint": "directories",
    "init_fsdp_model_from_checkpoint": "initialize",
    "init_model_from_checkpoint_for_evals": "initialize",
    "keep_checkpoint_copy": "directories",
    "keep_last_n_checkpoints": "directories",
    "load_checkpoint": "checkpointer",
    "register_dont_save_hooks": "dont_save",
    "save_checkpoint": "checkpointer",
}

__all__ = [
    "CheckpointRetentionPolicy",
    "CheckpointSaver",
    "RandomState",
    "cleanup_checkpoint",
    "find_all_checkpoints",
    "find_latest_checkpoint",
    "init_fsdp_model_from_checkpoint",
    "init_model_from_checkpoint_for_evals",
    "keep_checkpoint_copy",
    "keep_last_n_checkpoints",
    "load_checkpoint",
    "register_dont_save_hooks",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
