"""Lists of tensors that share their last axis, as one tensor and back: one matrix product instead of several."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cat_keep_shapes(tensors: Sequence[Tensor]) -> tuple[Tensor, list[torch.Size], list[int]]:
    """Concatenate tensors `[..., D]` over all but the last axis.

    Returns:
        The rows `[sum of counts, D]`, the original shapes, and the number of rows of each tensor.
    """
    shapes = [tensor.shape for tensor in tensors]
    counts = [math.prod(shape[:-1]) for shape in shapes]
    rows = [tensor.reshape(count, tensor.shape[-1]) for tensor, count in zip(tensors, counts, strict=True)]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)), shapes, counts


def uncat_with_shapes(flat: Tensor, shapes: Sequence[torch.Size], counts: Sequence[int]) -> list[Tensor]:
    """Undo `cat_keep_shapes`: tensors `[..., E]` with the leading axes of `shapes` and the last axis of `flat`."""
    parts = torch.split(flat, list(counts))
    return [part.reshape(*shape[:-1], flat.shape[-1]) for part, shape in zip(parts, shapes, strict=True)]
