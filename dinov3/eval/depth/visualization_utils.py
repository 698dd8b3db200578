"""Depth maps as pictures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dinov3.eval.depth.config import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from PIL.Image import Image

COLOUR_MAP = "plasma"


def depth_tensor_to_colorized_pil(
    depth: Tensor,
    colormap: str = COLOUR_MAP,
    min_depth: float | None = None,
    max_depth: float | None = None,
) -> "Image":
    """A depth map in colours.

    Args:
        depth: `[1, H, W]` or `[H, W]`.
        colormap: of matplotlib.
        min_depth, max_depth: what the first and the last colour stand for; default: extremes of the map. A map that is
            constant has the first colour.
    """
    from matplotlib import colormaps
    from PIL import Image

    values = depth.detach().float().cpu().reshape(depth.shape[-2:])
    low = values.min() if min_depth is None else torch.tensor(float(min_depth))
    high = values.max() if max_depth is None else torch.tensor(float(max_depth))
    span = high - low
    scaled = ((values - low) / span).clamp(0, 1) if span > 0 else torch.zeros_like(values)
    rgba: np.ndarray = colormaps[colormap](scaled.numpy(), bytes=True)
    return Image.fromarray(rgba[..., :3])


def normalized_tensor_to_pil(
    image: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> "Image":
    """A normalised image `[3, H, W]` as it was."""
    from PIL import Image

    pixels = unnormalize(image, mean, std) * 255
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).numpy())


def unnormalize(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """A normalised image `[3, H, W]` in [0, 1], on the CPU."""
    scale, shift = (torch.tensor(tuple(values)).view(3, 1, 1) for values in (std, mean))
    return (image.detach().float().cpu() * scale + shift).clamp(0, 1)


def alpha_blend(image: "Image", colours: "Image", alpha: float) -> "Image":
    """Colours laid over an image of the same size with opacity `alpha` (0 to 1)."""
    from PIL import Image

    top = colours.convert("RGBA")
    top.putalpha(round(255 * alpha))
    return Image.alpha_composite(image.convert("RGBA"), top).convert("RGB")
