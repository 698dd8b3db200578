"""Weights of networks for RGB images, in networks for images of other channels."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

logger = logging.getLogger("dinov3")

# The layers that see the image: of the ViTs, and of ConvNeXt.
_FIRST_LAYERS = ("patch_embed.proj.weight", "downsample_layers.0.0.weight")


def inflate_patch_embedding(
    state: Mapping[str, Tensor], like: Mapping[str, Tensor], *, rgb: Sequence[int] = (0, 1, 2)
) -> dict[str, Tensor]:
    """The state dict with its first layers for as many channels as those of `like` have.

    Filters of the channels `rgb` stay those of red, green and blue; those of further channels are their mean. All are
    multiplied by 3 / n, so that an image whose n channels are equal gives what its grey RGB image gave. For one or two
    channels, all filters are the mean.

    Args:
        state: weights [D, 3, h, w] in layers called `patch_embed.proj.weight` or `downsample_layers.0.0.weight`, with
            any prefix. Layers that fit already, and all others, are passed on.
        like: the state dict of the network that they are meant for.
        rgb: positions of red, green and blue among the channels.

    Raises:
        ValueError: `rgb` are not three different channels of the network.
    """
    inflated = dict(state)
    for key, weight in state.items():
        if not key.endswith(_FIRST_LAYERS) or key not in like or weight.ndim != 4:
            continue
        n_channels = like[key].shape[1]
        if weight.shape[1] != 3 or n_channels == 3:
            continue
        inflated[key] = _inflated(weight, n_channels, rgb)
        logger.info("%s: filters of 3 channels inflated to %d", key, n_channels)
    return inflated


def _inflated(weight: Tensor, n_channels: int, rgb: Sequence[int]) -> Tensor:
    filters = weight.mean(dim=1, keepdim=True).repeat(1, n_channels, 1, 1)
    if n_channels > 3:
        if len(rgb) != 3 or len(set(rgb)) != 3 or not all(0 <= channel < n_channels for channel in rgb):
            raise ValueError(f"rgb must be three different channels of {n_channels}, got {tuple(rgb)}")
        filters = filters.index_copy(1, torch.tensor(list(rgb), device=weight.device), weight)
    return filters * (3 / n_channels)
