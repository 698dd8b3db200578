"""Backbones: the vision transformer and ConvNeXt, what they have in common, and how to build them.

The builders are loaded on first use: they need the readers of weight files, which the networks themselves do not.
"""

from typing import Any

__all__ = ["build_model", "build_model_for_eval", "build_model_from_cfg", "init_fp8"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from dinov3.models import build

        return getattr(build, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
