"""Norms of feature maps by name."""

from collections.abc import Callable
from functools import partial

from torch import nn

from dinov3.layers.sync_batch_norm import FrozenBatchNorm2d, SyncBatchNorm
from dinov3.models.convnext import LayerNorm

_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "SyncBN": SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": partial(nn.GroupNorm, 32),
    "LN": partial(LayerNorm, data_format="channels_first"),
}


def get_norm(norm: str | Callable[[int], nn.Module] | None, out_channels: int) -> nn.Module | None:
    """A norm for maps `[B, C, h, w]` of `out_channels` channels.

    Args:
        norm: `BN`; `SyncBN`, over all processes; `FrozenBN`, which never changes; `GN`, of 32 groups; `LN`, over
            channels; a function of the number of channels; None or "": no norm.
        out_channels: C.

    Raises:
        ValueError: unknown name.
    """
    if norm is None or norm == "":
        return None
    if not isinstance(norm, str):
        return norm(out_channels)
    if norm not in _NORMS:
        raise ValueError(f"unknown norm {norm!r}; known: {', '.join(_NORMS)}")
    return _NORMS[norm](out_channels)
