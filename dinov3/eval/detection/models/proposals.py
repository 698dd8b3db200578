"""Proposals of the two-stage detector: boxes on a grid of several levels, in pixels or relative to each image.

Owns where they lie and which are valid. What the network makes of them is in `transformer.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinov3.eval.detection.config import log2_ratio
from dinov3.eval.detection.models.utils import LayerNorm2D
from dinov3.eval.detection.util.misc import resize_mask

# Proposals nearer to the border of the image than this part of it, or of sides shorter, are not used.
_MARGIN = 0.01
_RELATIVE_SIZE = 0.05


def level_projection(width: int, in_stride: int, target_stride: int) -> nn.Module:
    """From the feature map to a level of another stride, by convolutions that double or halve the stride."""
    steps = log2_ratio(target_stride, in_stride)
    kind = nn.Conv2d if steps > 0 else nn.ConvTranspose2d
    layers: list[nn.Module] = []
    for step in range(abs(steps)):
        if step:
            layers += [LayerNorm2D(width), nn.GELU()]
        layers.append(kind(width, width, kernel_size=2, stride=2))
    return nn.Sequential(*layers) if layers else nn.Identity()


def valid_sides(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of masks `[B, h, w]` that are not padding, `[B]` each (int64)."""
    return (~mask[:, :, 0]).sum(1), (~mask[:, 0, :]).sum(1)


def level_masks(mask: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The mask `[B, h, w]` at the size of each level."""
    return [resize_mask(mask, size) for size in sizes]


def absolute_proposals(
    masks: Sequence[Tensor], strides: Sequence[int], min_size: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Proposals in pixels.

    Args:
        masks: of each level `[B, h_l, w_l]`, true on padding.
        strides: pixels per cell of each level.
        min_size: side of the proposals of the first level [pixels].

    Returns:
        cxcywh boxes `[B, S, 4]`, those not valid with all numbers equal to the longer side of the canvas; which are
        valid, booleans `[B, S]`; heights and widths `[B]` of the images [pixels, int64].
    """
    height, width = (side * strides[0] for side in valid_sides(masks[0]))
    scale = torch.stack([width, height, width, height], dim=-1)[:, None].float()
    levels = []
    for level, (mask, stride) in enumerate(zip(masks, strides, strict=True)):
        x, y = _cell_centres(mask)
        size = torch.full_like(x, min_size * 2.0**level)
        levels.append(torch.stack([x * stride, y * stride, size, size], dim=-1).flatten(0, 1))
    boxes = torch.cat(levels).expand(masks[0].shape[0], -1, -1)
    inside = ((boxes > _MARGIN * scale) & (boxes < (1 - _MARGIN) * scale)).all(-1)
    valid = inside & ~torch.cat([mask.flatten(1) for mask in masks], dim=1)
    outside = max(masks[0].shape[-2:]) * float(strides[0])
    return boxes.masked_fill(~valid[..., None], outside), valid, (height, width)


def relative_proposals(masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of proposals relative to each image `[B, S, 4]` (cxcywh), those not valid infinite, and which are valid.

    Args:
        masks: of each level `[B, h_l, w_l]`, true on padding.
    """
    levels = []
    for level, mask in enumerate(masks):
        x, y = _cell_centres(mask)
        rows, columns = (side[:, None, None] for side in valid_sides(mask))
        # A level so coarse that an image has no cell in it divides by zero: infinite, hence not valid.
        x, y = x / columns, y / rows
        size = torch.full_like(x, _RELATIVE_SIZE * 2.0**level)
        levels.append(torch.stack([x, y, size, size], dim=-1).flatten(1, 2))
    boxes = torch.cat(levels, dim=1)
    inside = ((boxes > _MARGIN) & (boxes < 1 - _MARGIN)).all(-1)
    valid = inside & ~torch.cat([mask.flatten(1) for mask in masks], dim=1)
    return torch.logit(boxes).masked_fill(~valid[..., None], torch.inf), valid


def _cell_centres(mask: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of all cells `[h, w]`, in cells."""
    rows, columns = (torch.arange(n, device=mask.device, dtype=torch.float32) + 0.5 for n in mask.shape[-2:])
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return x, y
