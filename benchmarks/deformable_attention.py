"""Deformable attention beside the usual fallback, a loop over levels with `grid_sample`.

Forward, and forward with backward, of the core. Queries are the cells of three scales and look around themselves, as in
the adapter (one level of tokens to look at) and in the pixel decoder (three levels), for images of 512 pixels.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.frame.bench import Bench
from benchmarks.frame.measure import Call
from dinov3.eval.segmentation.models.utils.ms_deform_attn import ms_deform_attn_core_pytorch
from dinov3.eval.segmentation.models.utils.reference_points import cell_centres

Sizes = list[tuple[int, int]]
Core = Callable[[Tensor, Sizes, Tensor, Tensor], Tensor]

SCALES: Sizes = [(16, 16), (32, 32), (64, 64)]
TOKENS: Sizes = [(32, 32)]


class Size(NamedTuple):
    """One problem: images, heads, channels of a head, levels that are looked at."""

    batch: int
    heads: int
    dim: int
    levels: Sizes


SIZES = {
    "adapter-S": Size(2, 16, 12, TOKENS),
    "adapter-B": Size(2, 16, 24, TOKENS),
    "adapter-L": Size(2, 16, 32, TOKENS),
    "adapter-7B": Size(1, 16, 128, TOKENS),
    "pixel-256": Size(2, 16, 16, SCALES),
    "pixel-512": Size(2, 16, 32, SCALES),
    "pixel-2048": Size(1, 16, 128, SCALES),
}


def loop_over_levels(value: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
    """The usual fallback: samples of every level, stacked, weighted and summed."""
    n, _, heads, dim = value.shape
    queries, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
    grids = 2 * locations - 1
    samples = []
    for level, part in enumerate(value.split([height * width for height, width in sizes], dim=1)):
        maps = part.flatten(2).transpose(1, 2).reshape(n * heads, dim, *sizes[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(n * heads, 1, queries, levels * points)
    out = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)
    return out.view(n, heads * dim, queries).transpose(1, 2).contiguous()


def make_inputs(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, locations, weights (all with gradients), and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    n, heads, dim, levels = size
    n_cells, n_points = sum(height * width for height, width in levels), 4
    references = cell_centres(SCALES, torch.device("cpu"))[:, :, :, None, None]
    shape = (n, references.shape[1], heads, len(levels), n_points)
    extent = torch.tensor([[width, height] for height, width in levels])[:, None]
    locations = references + 2 * torch.randn(*shape, 2, generator=generator) / extent
    value = torch.randn(n, n_cells, heads, dim, generator=generator)
    weights = torch.rand(shape, generator=generator)
    inputs = (x.to(device).requires_grad_() for x in (value, locations, weights))
    return *inputs, torch.randn(n, shape[1], heads * dim, generator=generator).to(device)  # type: ignore[return-value]


def make_call(core: Core, size: Size, inputs: tuple[Tensor, Tensor, Tensor, Tensor], backward: bool) -> Call:
    """Forward without graph, or forward and backward."""
    value, locations, weights, grad = inputs

    def forward() -> Tensor:
        with torch.no_grad():
            return core(value, size.levels, locations, weights)

    def forward_backward() -> tuple[Tensor, ...]:
        out = core(value, size.levels, locations, weights)
        return torch.autograd.grad(out, (value, locations, weights), grad)

    return forward_backward if backward else forward


def run(bench: Bench) -> None:
    """All sizes."""
    for name, size in SIZES.items():
        inputs = make_inputs(size, bench.device)
        for backward in (False, True):
            what = "forward and backward" if backward else "forward"
            bench.time(
                f"deformable attention, {name} ({size.heads} x {size.dim}), {what}",
                {
                    "ours": partial(make_call, ms_deform_attn_core_pytorch, size, inputs, backward),
                    "loop over levels": partial(make_call, loop_over_levels, size, inputs, backward),
                },
                table="deformable attention",
                target=1.0,
            )
