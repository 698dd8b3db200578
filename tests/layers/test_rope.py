"""Rotary position tables and the rotation by them."""

import copy
import math

import pytest
import torch
from torch import Tensor

from dinov3.layers import RopePositionEmbedding, SelfAttention
from dinov3.layers.rope_position_encoding import rotate


def make(**options: object) -> RopePositionEmbedding:
    return RopePositionEmbedding(**({"embed_dim": 32, "num_heads": 2} | options)).eval()


def plain_rotation(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def test_rotation_preserves_lengths_and_depends_on_relative_position_only() -> None:
    rope = make()
    rope.periods.fill_(1.7)
    sin, cos = rope(H=1, W=8)
    q, k = torch.randn(16), torch.randn(16)
    rotated_q, rotated_k = rotate(q.expand(8, -1), (sin, cos)), rotate(k.expand(8, -1), (sin, cos))
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(8))
    products = rotated_q @ rotated_k.T
    for offset in range(-7, 8):
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    assert products[0].std() > 1e-2  # and it does depend on it


def test_rows_and_columns_have_their_own_halves_of_the_angles() -> None:
    sin, _ = make()(H=3, W=5)
    grid = sin.view(3, 5, 2, 2, 4)  # rows, columns, repetition, axis, frequency
    assert torch.equal(grid[:, :, 0], grid[:, :, 1])
    assert torch.equal(grid[:, :1, :, 0].expand(-1, 5, -1, -1), grid[:, :, :, 0])
    assert torch.equal(grid[:1, :, :, 1].expand(3, -1, -1, -1), grid[:, :, :, 1])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_rotation_equals_the_formula(grad: bool, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 8, dtype=dtype, requires_grad=grad)
    sin, cos = torch.randn(3, 8, dtype=dtype), torch.randn(3, 8, dtype=dtype)
    before = x.detach().clone()
    torch.testing.assert_close(rotate(x, (sin, cos)), plain_rotation(x, sin, cos))
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("grad", [False, True])
def test_rotation_takes_the_wider_tables_and_rounds_to_narrower_ones(grad: bool) -> None:
    x, sin, cos = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8)
    half = [t.bfloat16() for t in (x, sin, cos)]
    half[0].requires_grad_(grad)
    assert rotate(half[0], (sin, cos)).dtype == torch.float32
    torch.testing.assert_close(rotate(half[0], (sin, cos)), plain_rotation(half[0].float(), sin, cos))
    assert rotate(x, (half[1], half[2])).dtype == torch.bfloat16
    assert torch.equal(rotate(x, (half[1], half[2])), plain_rotation(*half))


def test_rotation_gradients() -> None:
    tensors = [torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda x, sin, cos: rotate(x, (sin, cos)), tensors)


def test_prefix_rows_leave_their_tokens_alone() -> None:
    rope = make(shift_coords=0.1).train()
    torch.manual_seed(0)
    sin, cos = rope(H=2, W=3, n_prefix=5)
    torch.manual_seed(0)
    plain = rope(H=2, W=3)
    assert torch.equal(sin[5:], plain[0])
    assert torch.equal(cos[5:], plain[1])
    x = torch.randn(11, 16)
    assert torch.equal(rotate(x, (sin, cos))[:5], x[:5])


def test_padded_tables_give_the_attention_of_short_ones() -> None:
    attention, x, rope = SelfAttention(32, num_heads=2).eval(), torch.randn(2, 11, 32), make()
    with torch.no_grad():
        torch.testing.assert_close(
            attention(x, rope=rope(H=2, W=3, n_prefix=5)), attention(x, rope=rope(H=2, W=3)), atol=1e-6, rtol=1e-6
        )


def test_tables_are_kept_until_the_periods_change() -> None:
    rope = make()
    first = rope(H=2, W=3)
    assert rope(H=2, W=3)[0] is first[0]
    rope.load_state_dict({"periods": rope.periods * 2})
    loaded = rope(H=2, W=3)
    assert not torch.equal(loaded[0], first[0])
    rope.periods.fill_(3.0)
    assert not torch.equal(rope(H=2, W=3)[0], loaded[0])
    rope.to("meta")
    assert rope(H=2, W=3)[0].is_meta
    rope.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(rope(H=2, W=3), first)
    torch.testing.assert_close(copy.deepcopy(rope)(H=2, W=3), first)


def test_kept_tables_are_few() -> None:
    rope = make()
    for width in range(1, 40):
        rope(H=1, W=width)
    assert len(rope._cache) <= 8


def test_tables_made_in_inference_mode_serve_a_later_backward_pass() -> None:
    rope = make()
    with torch.inference_mode():
        rope(H=2, W=2)
    x = torch.randn(4, 16, requires_grad=True)
    rotate(x, rope(H=2, W=2)).sum().backward()
    assert x.grad is not None


def test_random_coordinates_stay_in_their_ranges_and_are_off_in_eval() -> None:
    options = {"shift_coords": 0.3, "jitter_coords": 1.5, "rescale_coords": 2.0}
    rope = make(base=None, min_period=2 * math.pi * 10, max_period=2 * math.pi * 10, **options)
    rope.train()
    seen = []
    for _ in range(200):
        sin, _ = rope(H=1, W=2)
        angles = (10 * sin.asin()).view(2, 2, 2, 4)  # sine of small angles: coordinates again
        centre_h, (left, right) = angles[0, 0, 0, 0], angles[:, 0, 1, 0]
        seen.append([centre_h, (left + right) / 2, right - left])
    shift_h, shift_w, extent = torch.tensor(seen).T
    assert shift_h.abs().max() <= 0.3 * 3 + 1e-4
    assert shift_w.abs().max() <= 0.3 * 3 + 1e-4
    assert extent.min() >= 1 / 3 - 1e-4
    assert extent.max() <= 3 + 1e-4
    assert extent.max() / extent.min() > 3
    assert shift_h.std() > 0.05
    torch.testing.assert_close(
        rope.eval()(H=3, W=2), make(base=None, min_period=20 * math.pi, max_period=20 * math.pi)(H=3, W=2)
    )


def test_half_precision_tables_use_the_constructors_dtype_even_with_wider_periods() -> None:
    rope = make(dtype=torch.bfloat16)
    reference = rope(H=3, W=3)
    rope.float()
    assert rope.periods.dtype == torch.float32
    assert rope(H=3, W=3)[0].dtype == torch.bfloat16
    assert torch.equal(rope(H=3, W=3)[0], reference[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 36}, "multiple of 4"),
        ({"min_period": 1.0, "max_period": 2.0}, "either base"),
        ({"base": None}, "either base"),
        ({"base": None, "min_period": 1.0}, "either base"),
        ({"max_period": 1.0}, "either base"),
        ({"normalize_coords": "mean"}, "'separate'"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
