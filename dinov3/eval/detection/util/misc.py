"""Padded batches of images of several sizes, and the logit."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class NestedTensor(NamedTuple):
    """Images, or their feature maps, of several sizes on one canvas.

    Attributes:
        tensors: `[B, C, H, W]`, each image in the top left corner, zero elsewhere.
        mask: booleans `[B, H, W]`, true on padding.
    """

    tensors: Tensor
    mask: Tensor


def nested_tensor_from_tensor_list(images: Sequence[Tensor], size_divisor: int = 1) -> NestedTensor:
    """Images `[C, H, W]` on the smallest common canvas whose sides are multiples of `size_divisor`.

    Raises:
        ValueError: no images, or tensors that are no images.
    """
    if not len(images):
        raise ValueError("expected at least one image, got an empty list")
    wrong = [tuple(image.shape) for image in images if image.ndim != 3 or 0 in image.shape]
    if wrong or len({image.shape[0] for image in images}) > 1:
        raise ValueError(
            f"expected images [channels, height, width] with equal channels, got {wrong or [i.shape for i in images]}"
        )
    height, width = (-(-max(i.shape[d] for i in images) // size_divisor) * size_divisor for d in (1, 2))
    canvas = images[0].new_zeros((len(images), images[0].shape[0], height, width))
    mask = torch.ones((len(images), height, width), dtype=torch.bool, device=canvas.device)
    for row, image in enumerate(images):
        canvas[row, :, : image.shape[1], : image.shape[2]] = image
        mask[row, : image.shape[1], : image.shape[2]] = False
    return NestedTensor(canvas, mask)


def pad_to_multiple(batch: NestedTensor, divisor: int) -> NestedTensor:
    """The batch on a canvas whose sides are multiples of `divisor`; itself if they are."""
    height, width = batch.mask.shape[-2:]
    below, right = -height % divisor, -width % divisor
    if not below and not right:
        return batch
    tensors = F.pad(batch.tensors, (0, right, 0, below))
    return NestedTensor(tensors, F.pad(batch.mask, (0, right, 0, below), value=True))


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks `[B, H, W]` at another size: cell (i, j) is what lies at (floor(i H / h), floor(j W / w))."""
    rows, columns = (
        torch.arange(new, device=mask.device) * old // new for new, old in zip(size, mask.shape[-2:], strict=True)
    )
    return mask[:, rows][:, :, columns]


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """The logit of values that are clamped to [0, 1], finite: both x and 1 - x count as `eps` at least."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()
