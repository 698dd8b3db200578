"""Walking over sub-modules by their dotted names, and counting."""

import re
from collections.abc import Callable

from torch import nn

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def named_apply(
    fn: Callable[..., object],
    module: nn.Module,
    name: str = "",
    depth_first: bool = True,
    include_root: bool = False,
) -> nn.Module:
    """Call `fn(module=..., name=...)` on every descendant of `module`.

    Args:
        fn: called with keyword arguments; its result is dropped.
        module: root of the walk.
        name: dotted name of the root, put before the names of its descendants.
        depth_first: children before their parent; otherwise the parent first.
        include_root: call `fn` on the root too.

    Returns:
        The root.
    """
    if include_root and not depth_first:
        fn(module=module, name=name)
    for child_name, child in module.named_children():
        full_name = f"{name}.{child_name}" if name else child_name
        named_apply(fn, child, full_name, depth_first, include_root=True)
    if include_root and depth_first:
        fn(module=module, name=name)
    return module


def named_replace(
    fn: Callable[..., nn.Module],
    module: nn.Module,
    name: str = "",
    depth_first: bool = True,
    include_root: bool = False,
) -> nn.Module:
    """Replace every descendant of `module` by what `fn(module=..., name=...)` returns; arguments as in `named_apply`.

    Returns:
        The root, or its replacement when `include_root`.
    """
    if include_root and not depth_first:
        module = fn(module=module, name=name)
    for child_name, child in list(module.named_children()):
        full_name = f"{name}.{child_name}" if name else child_name
        setattr(module, child_name, named_replace(fn, child, full_name, depth_first, include_root=True))
    if include_root and depth_first:
        module = fn(module=module, name=name)
    return module


def count_parameters(module: nn.Module) -> int:
    """Number of elements of all parameters, each tensor counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def has_batchnorms(module: nn.Module) -> bool:
    """Whether a batch normalisation, synchronised or not, is part of the module."""
    return any(isinstance(child, _BATCH_NORMS) for child in module.modules())


# What FSDP, activation checkpointing, torch.compile, data parallelism and parametrizations add to names.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module|parametrizations|module)\."
)


def unwrapped_name(name: str) -> str:
    """Dotted name of a parameter or buffer as it was before its model was wrapped, compiled or parametrized."""
    return _WRAPPERS.sub("", name).removesuffix(".original")
