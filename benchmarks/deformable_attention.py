"""Deformable attention beside the usual fallback, a loop over levels with `grid_sample`, as a Markdown table.

    python -m benchmarks.deformable_attention [--rounds 9] [--sizes adapter-S,pixel-2048]

Forward, and forward with backward, of the core, on the accelerator if there is one, else on the CPU with as many
threads as torch takes. Both get the same tensors, in turns, so that a change of the machine's load meets both; reported
are medians. Queries are the cells of three scales and look around themselves, as in the adapter (one level of tokens to
look at) and in the pixel decoder (three levels), for images of 512 pixels.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.eval.segmentation.models.utils.ms_deform_attn import ms_deform_attn_core_pytorch
from dinov3.eval.segmentation.models.utils.reference_points import cell_centres
from dinov3.utils.device import default_device

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


def times(core: Core, size: Size, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """Seconds of forward without graph, and of forward and backward."""
    value, locations, weights, grad = inputs
    start = _now(value.device)
    with torch.no_grad():
        core(value, size.levels, locations, weights)
    forward = _now(value.device)
    torch.autograd.grad(core(value, size.levels, locations, weights), (value, locations, weights), grad)
    return forward - start, _now(value.device) - forward


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", default=",".join(SIZES), help="some of " + ", ".join(SIZES))
    args = parser.parse_args()

    device = default_device()
    print(f"{device.type}, torch {torch.__version__}, {torch.get_num_threads()} threads; ms\n")
    print("| size | heads x channels | levels | loop: forward | ours | ratio | loop: with backward | ours | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    cores: list[Core] = [loop_over_levels, ms_deform_attn_core_pytorch]
    for name in args.sizes.split(","):
        size = SIZES[name]
        inputs = make_inputs(size, device)
        rounds = [[times(core, size, inputs) for core in cores] for _ in range(args.rounds + 1)][1:]
        loop, ours = (
            [1e3 * statistics.median(column) for column in zip(*r, strict=True)] for r in zip(*rounds, strict=True)
        )
        cells = [f"{loop[i]:.1f} | {ours[i]:.1f} | {loop[i] / ours[i]:.2f}" for i in range(2)]
        print(f"| {name} | {size.heads} x {size.dim} | {len(size.levels)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
