"""Features of images with one call, and the attention that made them: for looking at a backbone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dinov3.layers.attention import SelfAttention
from dinov3.models.backbone import Backbone, resolve_layer_indices


class ExtractedFeatures(NamedTuple):
    """Outputs of some layers, in block order.

    Attributes:
        patches: per layer `[B, P, D]`, or maps `[B, D, h, w]`.
        class_tokens: per layer `[B, D]`.
        storage_tokens: per layer `[B, R, D]`.
        attention: per layer `[B, heads, N, N]` with N = 1 + R + P, rows sum to 1; empty unless asked for.
    """

    patches: tuple[Tensor, ...]
    class_tokens: tuple[Tensor, ...]
    storage_tokens: tuple[Tensor, ...]
    attention: tuple[Tensor, ...]


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    images: Tensor,
    layers: int | Sequence[int] = 1,
    *,
    reshape: bool = False,
    norm: bool = True,
    return_attention: bool = False,
) -> ExtractedFeatures:
    """Tokens of some layers, and how their tokens looked at each other.

    Args:
        backbone: a `Backbone`, used as it is (call `eval()` first for features without chance).
        images: normalised, `[B, C, H, W]`, on the backbone's device.
        layers: the number of last blocks, or block indices.
        reshape: patches as maps `[B, D, h, w]` instead of `[B, P, D]`.
        norm: apply the final norm to each layer.
        return_attention: also the attention of these layers, head by head. Its memory grows with the square of the
            number of tokens, which the ordinary path avoids.

    Raises:
        ValueError: attention of a backbone without self-attention, or layers that don't exist.
    """
    protocol = cast(Backbone, backbone)
    indices = resolve_layer_indices(layers, protocol.n_blocks)
    with _recorded_attention(backbone, indices if return_attention else []) as attention:
        outputs: Any = protocol.get_intermediate_layers(
            images, indices, reshape=reshape, norm=norm, return_class_token=True, return_extra_tokens=True
        )
    patches, class_tokens, storage_tokens = zip(*outputs, strict=True)
    return ExtractedFeatures(patches, class_tokens, storage_tokens, tuple(attention))


@contextmanager
def _recorded_attention(backbone: nn.Module, indices: Sequence[int]) -> Iterator[list[Tensor]]:
    """A list that fills with the attention of these blocks while the backbone runs."""
    modules = [module for module in backbone.modules() if isinstance(module, SelfAttention)]
    if indices and len(modules) != cast(Backbone, backbone).n_blocks:
        raise ValueError(f"{type(backbone).__name__} has no self-attention to return: pass return_attention=False")
    found: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        found.append(cast(SelfAttention, module).attention_weights(*args, **kwargs))

    hooks = [modules[index].register_forward_pre_hook(record, with_kwargs=True) for index in indices]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
