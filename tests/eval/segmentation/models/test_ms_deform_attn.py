"""Deformable attention: all ways to compute it, gradients, borders, the optional extension, what is refused."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.eval.segmentation.models.utils import ms_deform_attn
from dinov3.eval.segmentation.models.utils.deform_bags import BagDeformAttn
from dinov3.eval.segmentation.models.utils.ms_deform_attn import (
    MSDeformAttn,
    MSDeformAttnFunction,
    _gather_levels,
    _sample_levels,
    ms_deform_attn_core_pytorch,
)
from dinov3.eval.segmentation.models.utils.reference_points import cell_centres

SIZES = [(3, 5), (1, 2), (4, 1)]


def _inputs(dim: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Value, locations (inside, across the borders and far outside) and weights: 2 images, 2 heads, 4 queries."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(2, sum(h * w for h, w in SIZES), 2, dim, generator=generator, dtype=dtype)
    locations = torch.rand(2, 4, 2, 3, 2, 2, generator=generator, dtype=dtype) * 2 - 0.5
    locations[0, 0, 0, 0] = torch.tensor([[-50.0, 0.5], [0.5, 1e4]], dtype=dtype)
    weights = torch.rand(2, 4, 2, 3, 2, generator=generator, dtype=dtype)
    return tuple(x.requires_grad_() for x in (value, locations, weights))  # type: ignore[return-value]


def _by_definition(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The sum written out, cell by cell, in plain numbers."""
    n, queries, heads, _, points, _ = locations.shape
    out = torch.zeros(n, queries, heads, value.shape[-1], dtype=torch.float64)
    for i, q, m, p in (
        (i, q, m, p) for i in range(n) for q in range(queries) for m in range(heads) for p in range(points)
    ):
        start = 0
        for level, (height, width) in enumerate(SIZES):
            x = locations[i, q, m, level, p, 0].item() * width - 0.5
            y = locations[i, q, m, level, p, 1].item() * height - 0.5
            for row in (math.floor(y), math.floor(y) + 1):
                for column in (math.floor(x), math.floor(x) + 1):
                    if 0 <= row < height and 0 <= column < width:
                        share = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[i, q, m, level, p].item()
                        out[i, q, m] += share * value[i, start + row * width + column, m].detach()
            start += height * width
    return out.flatten(2)


def test_all_ways_give_the_sum_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    value, locations, weights = _inputs()
    expected = _by_definition(value, locations, weights)
    torch.testing.assert_close(_sample_levels(value, locations, weights, SIZES), expected)
    monkeypatch.setattr(ms_deform_attn, "_CPU_QUERIES", 3)
    torch.testing.assert_close(_sample_levels(value, locations, weights, SIZES), expected)
    torch.testing.assert_close(BagDeformAttn.apply(value, locations, weights, SIZES), expected)
    torch.testing.assert_close(_gather_levels(value, locations, weights, SIZES), expected)


def test_gradients_of_both_ways_in_float64() -> None:
    inputs = tuple(x.detach()[:1].clone().requires_grad_() for x in _inputs(2))
    assert torch.autograd.gradcheck(lambda *x: BagDeformAttn.apply(*x, SIZES), inputs)
    assert torch.autograd.gradcheck(lambda *x: _sample_levels(*x, SIZES), inputs)
    assert torch.autograd.gradcheck(
        lambda value, locations, weights: MSDeformAttnFunction.apply(value, SIZES, None, locations, weights, 64), inputs
    )


@pytest.mark.parametrize("dim", [4, 32])
def test_the_core_gives_gradients_in_float32_and_takes_shapes_as_tensors(dim: int) -> None:
    inputs = _inputs(dim, torch.float32)
    grad = torch.randn(2, 4, 2 * dim)
    out = ms_deform_attn_core_pytorch(inputs[0], torch.tensor(SIZES), *inputs[1:])
    other = _sample_levels(*inputs, SIZES)
    torch.testing.assert_close(out, other)
    for got, expected in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(other, inputs, grad), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_half_precision_is_computed_in_float32() -> None:
    value, locations, weights = _inputs(32, torch.float32)
    half = value.detach().bfloat16()
    got = ms_deform_attn_core_pytorch(half, SIZES, locations, weights)
    assert got.dtype == torch.bfloat16
    expected = ms_deform_attn_core_pytorch(half.float(), SIZES, locations, weights)
    assert torch.equal(got, expected.bfloat16())


@pytest.mark.parametrize("dim", [4, 32])
def test_a_query_that_is_not_a_number_spoils_no_other(dim: int) -> None:
    value, locations, weights = (x.detach() for x in _inputs(dim, torch.float32))
    expected = ms_deform_attn_core_pytorch(value, SIZES, locations, weights)
    locations[1, 2] = math.nan
    got = ms_deform_attn_core_pytorch(value, SIZES, locations, weights)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1, :2], expected[1, :2])


def test_levels_must_fit_the_cells() -> None:
    value, locations, weights = _inputs()
    with pytest.raises(ValueError, match=r"levels of sizes \[\(3, 5\)\] don't have 21 cells"):
        ms_deform_attn_core_pytorch(value, SIZES[:1], locations, weights)


def test_a_new_module_looks_around_its_references_with_equal_weights() -> None:
    module = MSDeformAttn(16, n_levels=2, n_heads=4, n_points=3)
    bias = module.sampling_offsets.bias.view(4, 2, 3, 2)
    expected = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])[:, None, None] * torch.tensor([1.0, 2, 3])[:, None]
    torch.testing.assert_close(bias.detach(), expected.expand(4, 2, 3, 2), atol=1e-6, rtol=0)
    assert not any(p.any() for p in (*module.attention_weights.parameters(), module.sampling_offsets.weight))


def test_padding_and_boxes() -> None:
    module = MSDeformAttn(16, n_levels=1, n_heads=2, n_points=2)
    feat, query, sizes = torch.randn(1, 12, 16), torch.randn(1, 5, 16), [(3, 4)]
    points = torch.rand(1, 5, 1, 2)
    everything = torch.ones(1, 12, dtype=torch.bool)
    out = module(query, points, feat, sizes, None, everything)
    torch.testing.assert_close(out, module.output_proj.bias.expand_as(out))
    # A box whose half sides are P cells counts offsets in cells, as a point does.
    boxes = torch.cat([points, torch.tensor([2 * 2 / 4, 2 * 2 / 3]).expand(1, 5, 1, 2)], dim=-1)
    torch.testing.assert_close(module(query, boxes, feat, sizes), module(query, points, feat, sizes))
    with pytest.raises(ValueError, match="reference points have 2 or 4 numbers, got 3"):
        module(query, torch.rand(1, 5, 1, 3), feat, sizes)
    with pytest.raises(ValueError, match="3 heads don't divide d_model=16"):
        MSDeformAttn(16, n_heads=3)


def test_the_extension_is_called_as_it_wants_to_be_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []

    def forward(value: Tensor, shapes: Tensor, start: Tensor, loc: Tensor, weight: Tensor, step: int) -> Tensor:
        assert shapes.dtype == start.dtype == torch.int64
        assert start.tolist() == [0, 15, 17]
        steps.append(step)
        return _sample_levels(value, loc, weight, SIZES)

    def backward(
        value: Tensor, shapes: Tensor, start: Tensor, loc: Tensor, weight: Tensor, grad: Tensor, step: int
    ) -> tuple[Tensor, ...]:
        assert grad.is_contiguous()
        leaves = [x.detach().requires_grad_() for x in (value, loc, weight)]
        with torch.enable_grad():
            out = _sample_levels(*leaves, SIZES)
        return torch.autograd.grad(out, leaves, grad)

    inputs = _inputs()
    expected = ms_deform_attn_core_pytorch(inputs[0], SIZES, *inputs[1:])
    wanted = torch.autograd.grad(expected.sum(), inputs)
    extension: Any = SimpleNamespace(ms_deform_attn_forward=forward, ms_deform_attn_backward=backward)
    monkeypatch.setattr(ms_deform_attn, "_extension", lambda value: extension)
    out = MSDeformAttnFunction.apply(inputs[0], torch.tensor(SIZES), None, *inputs[1:], 64)
    torch.testing.assert_close(out, expected)
    for got, want in zip(torch.autograd.grad(out.sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(got, want)
    assert steps == [2]  # divides the two images


def test_cell_centres() -> None:
    centres = cell_centres([(1, 2), (2, 1)], torch.device("cpu"))
    assert centres.shape == (1, 4, 1, 2)
    assert centres[0, :, 0].tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]
