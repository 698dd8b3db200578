"""DINOv3: self-supervised vision backbones, their training and their evaluation.

The rooms, from the ground up: `utils`; `distributed`, `logging`; `layers`, `loss`, `optim`, `data`; `models`,
`checkpointer`, `fsdp`, `configs`; `hub`; `train`, `eval`; `run`. A module imports lower rooms only.

Whole tasks with one call: `pretrain`, `evaluate`, `finetune`, `predict`, `export` (see `run.api`). They are loaded on
first use: importing this package alone needs nothing but Python.
"""

from typing import Any

__version__ = "0.0.1"

_API = ("evaluate", "export", "finetune", "predict", "pretrain")


def __getattr__(name: str) -> Any:
    if name in _API:
        from importlib import import_module

        return getattr(import_module("dinov3.run.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
