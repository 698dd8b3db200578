"""Keeping weights out of checkpoints that can be had elsewhere (frozen backbones and teachers)."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

_WRAPPER = "_checkpoint_wrapped_module."


def register_dont_save_hooks(module: nn.Module, dont_save: Iterable[str]) -> None:
    """Leave keys out of `state_dict()`, and don't miss them in `load_state_dict()`, where they keep their values.

    It works as well when `module` is part of a larger one. A state dict that has the keys nevertheless is loaded whole.

    Args:
        module: gets the hooks.
        dont_save: keys of its state dict (without the names of activation-checkpointing wrappers).
    """
    unsaved = {_clean(key) for key in dont_save}

    def drop(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any]) -> None:
        for key in list(state_dict):
            if key.startswith(prefix) and _clean(key[len(prefix) :]) in unsaved:
                del state_dict[key]

    def keep_own(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, tensor in _own_tensors(module).items():
            if _clean(name) in unsaved:
                # The wrappers expect names without themselves, as in a state dict.
                state_dict.setdefault(prefix + _clean(name), tensor.detach())

    module.register_state_dict_post_hook(drop)
    module.register_load_state_dict_pre_hook(keep_own)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _clean(key: str) -> str:
    return key.replace(_WRAPPER, "")
