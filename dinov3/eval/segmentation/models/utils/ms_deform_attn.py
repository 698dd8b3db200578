"""Multi-scale deformable attention: every query reads a few points, which it chooses itself, of each level.

In pure PyTorch and differentiable on every device; a compiled extension is used where one is installed.

Source: Zhu et al., Deformable DETR (2021), section 4.1.
"""

import importlib.util
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinov3.eval.segmentation.models.utils.deform_bags import BagDeformAttn
from dinov3.layers.linear import apply_linear
from dinov3.utils.dtype import autocast_to

SpatialShapes = Tensor | Sequence[tuple[int, int]]
"""(H, W) of every level: pairs of numbers, or a tensor `[L, 2]` (reading one from a GPU makes the CPU wait)."""

# Channels of a head from which bags are faster on a CPU than sampling: see benchmarks/deformable_attention.py.
_MIN_BAG_DIM = 32
# Queries that are sampled at a time there.
_CPU_QUERIES = 1024
_EXTENSION = "MultiScaleDeformableAttention"


def ms_deform_attn_core_pytorch(
    value: Tensor, value_spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sum over levels and points of weight times bilinear sample; zero outside of the maps.

    Args:
        value: `[N, S, M, D]`: cells of all levels, row by row; M heads of D channels.
        value_spatial_shapes: (H, W) of the L levels.
        sampling_locations: `[N, Lq, M, L, P, 2]`, (x, y) from 0 to 1 over each level.
        attention_weights: `[N, Lq, M, L, P]`.

    Returns:
        `[N, Lq, M * D]`, in the dtype of `value`; computed in float32, or float64 if given.

    Raises:
        ValueError: the levels don't have S cells together.
    """
    sizes = _as_sizes(value_spatial_shapes)
    if sum(height * width for height, width in sizes) != value.shape[1]:
        raise ValueError(f"levels of sizes {sizes} don't have {value.shape[1]} cells together")
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    inputs = value.to(dtype), sampling_locations.to(dtype), attention_weights.to(dtype)
    with autocast_to(value.device, torch.float32):
        if torch.compiler.is_exporting():
            out = _gather_levels(*inputs, sizes)
        elif value.device.type == "cpu" and value.shape[-1] >= _MIN_BAG_DIM:
            out = BagDeformAttn.apply(*inputs, sizes)
        else:
            out = _sample_levels(*inputs, sizes)
    return out.to(value.dtype)


def _sample_levels(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """The core with torch's sampling: level by level, summed up at once.

    The queries' points lie in rows, one row for the first points, one for the second: torch samples rows many at a
    time, and their sum runs along them. On a CPU some queries at a time, whose samples stay in the cache.
    """
    n_images, _, n_heads, dim = value.shape
    n_queries = locations.shape[1]
    grids = (2 * locations - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # [L, N*M, P, Lq, 2]
    weights = weights.permute(3, 0, 2, 4, 1).flatten(1, 2).unsqueeze(2)  # [L, N*M, 1, P, Lq]
    parts = value.split([height * width for height, width in sizes], dim=1)
    maps = [
        part.permute(0, 2, 3, 1).reshape(n_images * n_heads, dim, *size)
        for part, size in zip(parts, sizes, strict=True)
    ]
    step = _CPU_QUERIES if value.device.type == "cpu" else max(n_queries, 1)
    some = zip(grids.split(step, dim=3), weights.split(step, dim=4), strict=True)
    out = torch.cat([_sum_samples(maps, *inputs) for inputs in some], dim=-1)  # [N*M, D, Lq]
    return out.view(n_images, n_heads * dim, n_queries).transpose(1, 2)


def _sum_samples(maps: Sequence[Tensor], grids: Tensor, weights: Tensor) -> Tensor:
    """Weighted samples `[B, D, Q]`, summed over levels and points.

    Args:
        maps: `[B, D, H, W]` of each level.
        grids: `[L, B, P, Q, 2]`, from -1 to 1.
        weights: `[L, B, 1, P, Q]`.
    """
    out: Tensor | None = None
    for level, grid, weight in zip(maps, grids.contiguous(), weights.contiguous(), strict=True):
        samples = F.grid_sample(level, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        for sample, factor in zip(samples.unbind(2), weight.unbind(2), strict=True):
            out = sample * factor if out is None else out.addcmul_(sample, factor)
    assert out is not None, "there are levels and points"
    return out


def _gather_levels(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """The core in elementary operations, for graphs: reads the four cells around each point by their numbers."""
    n_images, n_cells, n_heads, dim = value.shape
    table = value.reshape(-1, dim)  # rows (image, cell, head)
    images = torch.arange(n_images, device=value.device).view(-1, 1, 1, 1, 1, 1) * n_cells
    heads = torch.arange(n_heads, device=value.device).view(-1, 1, 1, 1)
    first, out = 0, value.new_zeros(())
    for level, (height, width) in enumerate(sizes):
        columns, right = _corners(locations[..., level, :, 0], width)  # [N, Lq, M, P, 2]
        rows, down = _corners(locations[..., level, :, 1], height)
        cells = first + rows[..., :, None] * width + columns[..., None, :]  # [N, Lq, M, P, 2, 2]
        factors = weights[..., level, :, None, None] * down[..., :, None] * right[..., None, :]
        read = F.embedding(((images + cells) * n_heads + heads).flatten(3), table)  # [N, Lq, M, P * 4, D]
        out = out + (read * factors.flatten(3)[..., None]).sum(-2)
        first = first + height * width
    return out.flatten(2)


def _corners(locations: Tensor, n_cells: int) -> tuple[Tensor, Tensor]:
    """Numbers of the cells before and behind each place from 0 to 1, and their shares; none if outside: `[..., 2]`."""
    position = locations * n_cells - 0.5
    before = position.floor()
    share = position - before
    cells = torch.stack([before, before + 1], dim=-1)
    shares = torch.stack([1 - share, share], dim=-1)
    inside = (cells >= 0) & (cells <= n_cells - 1)
    return cells.clamp(0, n_cells - 1).long(), shares * inside


class MSDeformAttnFunction(torch.autograd.Function):
    """The core under the signature of the compiled extension, which it calls where it can.

    Elsewhere it computes the core in forward and once more in backward, which saves memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        value_spatial_shapes: SpatialShapes,
        value_level_start_index: Tensor | None,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """See `ms_deform_attn_core_pytorch`.

        Args:
            value_level_start_index: first cell of every level `[L]`; None: computed.
            im2col_step: images that the extension takes at a time; made a divisor of their number.
        """
        ctx.sizes = _as_sizes(value_spatial_shapes)
        ctx.im2col_step = math.gcd(len(value), im2col_step)
        ctx.save_for_backward(value, sampling_locations, attention_weights)
        extension = _extension(value)
        if extension is None:
            return ms_deform_attn_core_pytorch(value, ctx.sizes, sampling_locations, attention_weights)
        inputs = (value, *_index_tensors(ctx.sizes, value), sampling_locations, attention_weights)
        out: Tensor = extension.ms_deform_attn_forward(*(x.contiguous() for x in inputs), ctx.im2col_step)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of value, locations and weights."""
        value, locations, weights = ctx.saved_tensors
        extension = _extension(value)
        if extension is None:
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in (value, locations, weights)]
                out = ms_deform_attn_core_pytorch(inputs[0], ctx.sizes, inputs[1], inputs[2])
            grads = torch.autograd.grad(out, inputs, grad_output)
        else:
            tensors = (value, *_index_tensors(ctx.sizes, value), locations, weights, grad_output)
            grads = extension.ms_deform_attn_backward(*(x.contiguous() for x in tensors), ctx.im2col_step)
        return grads[0], None, None, grads[1], grads[2], None


class MSDeformAttn(nn.Module):
    """Deformable attention from queries to the cells of several levels.

    Args:
        d_model: channels of queries and cells; divided among the heads.
        n_levels: L.
        n_heads: M.
        n_points: P, per head and level.
        ratio: channels of the values, as a part of `d_model`.

    Raises:
        ValueError: the heads don't divide the channels.
    """

    def __init__(
        self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4, ratio: float = 1.0
    ) -> None:
        super().__init__()
        d_value = int(d_model * ratio)
        if d_model % n_heads or d_value % n_heads:
            raise ValueError(f"{n_heads} heads don't divide d_model={d_model} and the {d_value} channels of the values")
        self.d_model, self.n_levels, self.n_heads, self.n_points, self.ratio = (
            d_model,
            n_levels,
            n_heads,
            n_points,
            ratio,
        )
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_value)
        self.output_proj = nn.Linear(d_value, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Head m looks in direction 2 pi m / M, its points at distances 1 to P (of a square), all with one weight."""
        angles = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        distances = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * distances[:, None]  # [M, 1, P, 2]
        self.sampling_offsets.bias.copy_(offsets.expand(-1, self.n_levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: SpatialShapes,
        input_level_start_index: Tensor | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """What each query reads, `[N, Lq, d_model]`.

        Args:
            query: `[N, Lq, d_model]`.
            reference_points: `[N or 1, Lq, L or 1, 2]`: (x, y) that offsets count from, in cells; or with 4 numbers,
                (x, y, width, height) of boxes, whose halves offsets over P are parts of. From 0 to 1 over the image.
            input_flatten: cells of all levels `[N, S, d_model]`.
            input_spatial_shapes: (H, W) of the levels.
            input_level_start_index: not needed; accepted as published code passes it.
            input_padding_mask: `[N, S]`, True at cells that are padding and count as zeros.

        Raises:
            ValueError: reference points of other than 2 or 4 numbers, or levels that don't fit the cells.
        """
        sizes = _as_sizes(input_spatial_shapes)
        value = apply_linear(self.value_proj, input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.n_heads, -1))
        layout = (self.n_heads, self.n_levels, self.n_points)
        offsets = apply_linear(self.sampling_offsets, query).unflatten(-1, (*layout, 2))
        logits = apply_linear(self.attention_weights, query).transpose(1, 2).unflatten(1, (self.n_heads, -1))
        weights = logits.softmax(2).permute(0, 3, 1, 2).unflatten(-1, layout[1:])  # queries last: that is much faster
        locations = self._locations(reference_points, offsets, sizes)
        if _extension(value) is None:
            out = ms_deform_attn_core_pytorch(value, sizes, locations, weights)
        else:
            inputs = value.float(), sizes, None, locations.float(), weights.float(), 64
            out = MSDeformAttnFunction.apply(*inputs).to(value.dtype)
        return apply_linear(self.output_proj, out)

    def _locations(self, reference: Tensor, offsets: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """`[N, Lq, M, L, P, 2]`."""
        reference = reference[:, :, None, :, None]
        if reference.shape[-1] == 2:
            # Filled one by one: a tensor made of a list would fix the sizes of a graph.
            sides = [side for height, width in sizes for side in (width, height)]
            extent = torch.cat([reference.new_full((1,), side) for side in sides])
            return reference + offsets / extent.view(-1, 1, 2)
        if reference.shape[-1] == 4:
            return reference[..., :2] + offsets / self.n_points * reference[..., 2:] * 0.5
        raise ValueError(f"reference points have 2 or 4 numbers, got {reference.shape[-1]}")


def _as_sizes(spatial_shapes: SpatialShapes) -> list[tuple[int, int]]:
    pairs = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    return [(height, width) for height, width in pairs]


def _index_tensors(sizes: Sequence[tuple[int, int]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes `[L, 2]` and first cells `[L]` of the levels, int64, as the extension wants them."""
    shapes = torch.tensor(sizes, dtype=torch.int64, device=like.device)
    areas = shapes.prod(dim=1)
    return shapes, areas.cumsum(0) - areas


def _extension(value: Tensor) -> ModuleType | None:
    """The compiled extension, if it is installed and can work on `value`."""
    if not value.is_cuda or importlib.util.find_spec(_EXTENSION) is None:
        return None
    return importlib.import_module(_EXTENSION)
