"""Deformable attention on CPUs: a weighted sum of rows, one head of one image at a time.

A bilinear sample is a weighted sum of four neighbouring values, so all that a query reads of all levels is one weighted
sum of rows of a table, an "embedding bag". Compared with sampling level by level, values keep their layout (a row per
cell), nothing of the size queries x points x channels is ever made, and one head's table fits into the cache.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Sizes = Sequence[tuple[int, int]]


class BagDeformAttn(torch.autograd.Function):
    """`ms_deform_attn_core_pytorch` with bags. Samples and weights are computed again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, sizes: Sizes) -> Tensor:
        """Shapes as in the core; `sizes`: (H, W) of the levels."""
        ctx.save_for_backward(value, locations, weights)
        ctx.sizes = sizes
        n_images, _, n_heads, dim = value.shape
        levels = _Levels(sizes, locations)
        out = value.new_empty(n_images, locations.shape[1], n_heads, dim)
        for n in range(n_images):
            for m in range(n_heads):
                rows, factors = levels.bags(locations[n, :, m], weights[n, :, m])
                out[n, :, m] = _sum_rows(levels.pad(value[n, :, m]), rows, factors)
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of value, locations and weights."""
        value, locations, weights = ctx.saved_tensors
        n_images, _, n_heads, dim = value.shape
        levels = _Levels(ctx.sizes, locations)
        grad_output = grad_output.unflatten(2, (n_heads, dim))
        grad_value, grad_locations, grad_weights = (torch.empty_like(x) for x in (value, locations, weights))
        for n in range(n_images):
            for m in range(n_heads):
                grad = grad_output[n, :, m].contiguous()
                table = levels.pad(value[n, :, m])
                with torch.enable_grad():
                    where, weight = (x[n, :, m].detach().requires_grad_() for x in (locations, weights))
                    rows, factors = levels.bags(where, weight)
                    out = _sum_rows(table, rows, factors)
                grad_locations[n, :, m], grad_weights[n, :, m] = torch.autograd.grad(out, (where, weight), grad)
                grad_value[n, :, m] = levels.unpad(_scatter_rows(grad, rows, factors.detach(), len(table)))
        return grad_value, grad_locations, grad_weights, None


class _Levels:
    """Tables of one head: the cells of all levels row by row, with zeros around each level.

    A level of H x W cells takes (H + 2)(W + 1) rows: one more cell at the left of each line, which closes the line
    before it as well, and a line above and below. One more row of zeros closes the last line.
    """

    def __init__(self, sizes: Sizes, like: Tensor) -> None:
        self.sizes = sizes
        self.extent = like.new_tensor([[width, height] for height, width in sizes])[:, None]  # [L, 1, 2], x before y
        starts, start = [], 0
        for height, width in sizes:
            starts.append(start + width + 2)  # of the first cell
            start += (height + 2) * (width + 1)
        self.first = torch.tensor(starts, dtype=torch.int32)[:, None]
        self.line = torch.tensor([width + 1 for _, width in sizes], dtype=torch.int32)[:, None]
        # Of the four cells around a point, counted from the upper left one: [L, 4, 1].
        self.neighbours = torch.stack([torch.zeros_like(self.line), self.line], dim=1) + torch.tensor(
            [[0, 1]], dtype=torch.int32
        )
        self.neighbours = self.neighbours.reshape(len(sizes), 4, 1)

    def pad(self, value: Tensor) -> Tensor:
        """The table `[T, D]` of values `[S, D]`."""
        parts = value.split([height * width for height, width in self.sizes])
        grids = (part.unflatten(0, size) for part, size in zip(parts, self.sizes, strict=True))
        padded = [F.pad(grid, (0, 0, 1, 0, 1, 1)).flatten(0, 1) for grid in grids]
        return torch.cat([*padded, value.new_zeros(1, value.shape[1])])

    def unpad(self, table: Tensor) -> Tensor:
        """The values `[S, D]` of a table `[T, D]`."""
        padded = [(height + 2, width + 1) for height, width in self.sizes]
        parts = table[:-1].split([height * width for height, width in padded])
        grids = (part.unflatten(0, size) for part, size in zip(parts, padded, strict=True))
        return torch.cat([grid[1:-1, 1:].flatten(0, 1) for grid in grids])

    def bags(self, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the table that each query reads, and their factors, both `[Lq, L * 4 * P]`.

        Args:
            locations: `[Lq, L, P, 2]`; points far outside read zeros from the border.
            weights: `[Lq, L, P]`.
        """
        xy = torch.minimum((locations * self.extent - 0.5).clamp(min=-1), self.extent)
        corner = torch.minimum(xy.detach().floor(), self.extent - 1)
        right, down = (xy - corner).unbind(-1)
        x, y = corner.nan_to_num().int().unbind(-1)  # a NaN stays one in the factors
        lower = weights * down
        upper = weights - lower
        lower_right, upper_right = lower * right, upper * right
        factors = torch.stack([upper - upper_right, upper_right, lower - lower_right, lower_right], dim=2)
        rows = (y * self.line + x + self.first).unsqueeze(2) + self.neighbours
        return rows.flatten(1), factors.flatten(1)


def _sum_rows(table: Tensor, rows: Tensor, factors: Tensor) -> Tensor:
    """Weighted sums `[Q, D]` of rows `[Q, K]` of the table."""
    return F.embedding_bag(rows, table, per_sample_weights=factors, mode="sum")


def _scatter_rows(grad: Tensor, rows: Tensor, factors: Tensor, n_rows: int) -> Tensor:
    """Gradient `[T, D]` of the table: weighted sums too, over the queries that read a row, found by sorting."""
    sorted_rows, order = rows.flatten().sort(stable=True)
    starts = torch.searchsorted(sorted_rows, torch.arange(n_rows, dtype=torch.int32), out_int32=True)
    queries = (order // rows.shape[1]).int()
    factors = factors.flatten().index_select(0, order)
    return F.embedding_bag(queries, grad, starts, per_sample_weights=factors, mode="sum")
