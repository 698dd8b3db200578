"""Depth of images of any size, in metres, at the size of the image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.eval.depth.models.linear_head import resize
from dinov3.eval.depth.transforms import LeftRightFlipAug


def make_inference(
    depther: nn.Module,
    images: Tensor,
    *,
    size: int | Sequence[int] | None = None,
    use_tta: bool = False,
    depth_range: tuple[float, float] | None = None,
) -> Tensor:
    """Depth [metres] `[B, 1, H, W]` of normalised images `[B, 3, H, W]`.

    Args:
        depther: from images to depth of any resolution; in evaluation mode.
        images: any size; those that are no multiples of the patch are padded (or what the depther's encoder does).
        size: shorter side, or (height, width), that images are resized to first (bilinear, antialiased) [pixels]; None:
            they are predicted as they are.
        use_tta: average over an image and its mirror image.
        depth_range: (smallest, largest) depth that the result is clamped to [metres]; None: as predicted.

    Raises:
        ValueError: a size that makes no sense; by backbones: images that are too small for them.
    """
    if images.ndim != 4:
        raise ValueError(f"expected images [B, 3, H, W], got {list(images.shape)}")
    full = images.shape[-2:]
    if size is not None:
        images = F.interpolate(
            images, size=_target_size(full, size), mode="bilinear", antialias=True, align_corners=False
        )
    views = LeftRightFlipAug(flip=use_tta)
    batch = torch.cat([images, images.flip(-1)]) if use_tta else images
    with torch.inference_mode():
        depth = resize(views.inverse(depther(batch)), full)
    return depth if depth_range is None else depth.clamp(*depth_range)


def _target_size(full: Sequence[int], size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        scale = size / min(full)
        size = (round(full[0] * scale), round(full[1] * scale))
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size is the length of the shorter side, or (height, width); got {size}")
    return size[0], size[1]
