"""Cross attention with box-RPE: chunks of queries bound the memory and change no number."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov3.eval.detection.models.global_rpe_decomp_decoder import GlobalCrossAttention

Q, H, W, DIM, HEADS, HIDDEN = 60, 12, 16, 32, 4, 8


class LargestTensor(TorchDispatchMode):
    """The most numbers that any tensor made within holds."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.numbers = max(self.numbers, *made, 0)
        return result


def _attention(max_bias_numbers: int, **options: Any) -> GlobalCrossAttention:
    torch.manual_seed(0)
    return GlobalCrossAttention(DIM, HEADS, HIDDEN, reparam=True, max_bias_numbers=max_bias_numbers, **options)


def _inputs() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, Q, DIM, generator=generator, requires_grad=True)
    boxes = torch.rand(2, Q, 4, generator=generator) * 100
    memory = torch.randn(2, H * W, DIM, generator=generator, requires_grad=True)
    padding = torch.arange(H * W).expand(2, -1) > 150
    return query, boxes, memory, memory, (H, W), padding


PER_QUERY = 2 * (HEADS * H * W + (H + W) * HIDDEN)


@pytest.mark.parametrize("rpe_type", ["linear", "abs_log8"])
def test_chunks_change_neither_numbers_nor_gradients(rpe_type: str) -> None:
    results = []
    for limit in (PER_QUERY * Q, PER_QUERY * 7, 1):
        attention, inputs = _attention(limit, rpe_type=rpe_type), _inputs()
        output = attention(*inputs)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        results.append([output, inputs[0].grad, inputs[2].grad, *(p.grad for p in attention.parameters())])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * max(float(want.detach().abs().max()), 1.0))


def test_no_tensor_holds_queries_times_cells_times_heads() -> None:
    limit = PER_QUERY * 7
    with torch.no_grad(), LargestTensor() as unbounded:
        _attention(2**25)(*_inputs())
    with torch.no_grad(), LargestTensor() as bounded:
        _attention(limit)(*_inputs())
    assert unbounded.numbers >= 2 * HEADS * Q * H * W
    assert bounded.numbers <= limit < unbounded.numbers / 4


def test_training_keeps_no_bias_for_the_backward_pass() -> None:
    def kept(limit: int) -> int:
        sizes: list[int] = []

        def count(x: Tensor) -> Tensor:
            sizes.append(x.untyped_storage().nbytes() // 4)
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            output = _attention(limit)(*_inputs())
        del output
        return max(sizes)

    assert kept(2**25) >= 2 * HEADS * Q * H * W
    assert kept(PER_QUERY * 7) <= 2 * H * W * DIM  # the memory itself


def test_relative_boxes_are_those_in_pixels_over_the_map() -> None:
    query, boxes, memory, _, shape, padding = _inputs()
    absolute, relative = _attention(2**25), _attention(2**25)
    relative.reparam = False
    scale = torch.tensor([W, H, W, H]) * 16.0
    got = relative(query, boxes[:, :, None] / scale, memory, memory, shape, padding)
    torch.testing.assert_close(got, absolute(query, boxes, memory, memory, shape, padding), rtol=1e-4, atol=1e-4)


def test_offsets_stay_exact_under_autocast() -> None:
    attention = _attention(2**25)
    edges = torch.tensor([[[2047.0, 2051.0]]])
    want = attention._bias(attention.cpb_mlp1, edges, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention._bias(attention.cpb_mlp1, edges, 4)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_padding_is_left_out() -> None:
    attention = _attention(2**25)
    query, boxes, memory, _, shape, padding = _inputs()
    changed = memory + padding[..., None] * 5.0
    with torch.no_grad():
        got = attention(query, boxes, changed, changed, shape, padding)
        torch.testing.assert_close(got, attention(query, boxes, memory, memory, shape, padding), rtol=1e-4, atol=1e-4)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="rpe_type must be 'linear' or 'abs_log8', got 'cubic'"):
        GlobalCrossAttention(DIM, HEADS, rpe_type="cubic")
