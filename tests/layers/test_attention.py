"""Self-attention layers."""

import pytest
import torch
from torch.nn import functional as F

from dinov3.layers import CausalSelfAttention, LinearKMaskedBias, SelfAttention
from dinov3.layers.attention import _apply_rope


def test_k_masked_bias_is_right_from_the_start() -> None:
    linear = LinearKMaskedBias(4, 12)
    torch.nn.init.ones_(linear.bias)
    assert torch.equal(linear(torch.zeros(4)), torch.tensor([1.0] * 4 + [0.0] * 4 + [1.0] * 4))
    linear.to("meta").to_empty(device="cpu").reset_mask()
    assert torch.equal(linear.bias_mask, torch.tensor([1.0] * 4 + [0.0] * 4 + [1.0] * 4))


def test_k_masked_bias_without_bias_has_no_mask() -> None:
    assert list(LinearKMaskedBias(4, 12, bias=False).state_dict()) == ["weight"]
    with pytest.raises(ValueError, match="no multiple of 3"):
        LinearKMaskedBias(4, 8)


def test_masked_key_bias_gets_no_gradient() -> None:
    linear = LinearKMaskedBias(4, 12)
    linear(torch.randn(3, 4)).square().sum().backward()
    assert linear.bias.grad[4:8].abs().max() == 0
    assert linear.bias.grad[:4].abs().min() > 0


def make_attention(**options: object) -> SelfAttention:
    return SelfAttention(32, num_heads=4, qkv_bias=True, **options)


def tables(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 8).sin(), torch.randn(n, 8).cos()


def test_list_equals_one_by_one() -> None:
    attention = make_attention()
    x_list, ropes = [torch.randn(2, 7, 32), torch.randn(3, 5, 32)], [tables(6), None]
    for got, x, rope in zip(attention.forward_list(x_list, rope_list=ropes), x_list, ropes, strict=True):
        torch.testing.assert_close(got, attention(x, rope=rope))


def test_samples_do_not_see_each_other() -> None:
    attention, x, rope = make_attention(), torch.randn(3, 7, 32), tables(6)
    torch.testing.assert_close(attention(x, rope=rope)[1:2], attention(x[1:2], rope=rope))


def test_per_sample_tables_equal_shared_ones_where_they_agree() -> None:
    attention, x, rope = make_attention(), torch.randn(2, 7, 32), tables(6)
    per_sample = tuple(t.expand(2, 1, -1, -1) for t in rope)
    torch.testing.assert_close(attention(x, rope=per_sample), attention(x, rope=rope))


def test_dropouts_act_in_training_only_and_in_lists_too() -> None:
    for options in ({"attn_drop": 0.5}, {"proj_drop": 0.5}):
        attention, x = make_attention(**options), torch.randn(2, 7, 32)
        attention.train()
        assert not torch.equal(attention(x), attention(x))
        first, second = (attention.forward_list([x], rope_list=[None])[0] for _ in range(2))
        assert not torch.equal(first, second)
        attention.eval()
        assert torch.equal(attention(x), attention(x))


def test_bad_arguments() -> None:
    attention, x = make_attention(), torch.randn(2, 7, 32)
    with pytest.raises(ValueError, match="attn_bias"):
        attention(x, attn_bias=torch.zeros(7, 7))
    with pytest.raises(ValueError, match="rope_list"):
        attention.forward_list([x])
    with pytest.raises(ValueError, match="rope_list"):
        attention.forward_list([x], rope_list=[None, None])
    with pytest.raises(ValueError, match="multiple of num_heads"):
        SelfAttention(32, num_heads=5)


def test_causal_attention_does_not_look_ahead() -> None:
    attention, x = CausalSelfAttention(32, num_heads=4), torch.randn(2, 7, 32)
    changed = x.clone()
    changed[:, 4:] += 1
    assert torch.equal(attention(x)[:, :4], attention(changed)[:, :4])
    assert not torch.equal(attention(x, is_causal=False)[:, :4], attention(changed, is_causal=False)[:, :4])


def test_causal_initialisation() -> None:
    attention = CausalSelfAttention(256, num_heads=4, qkv_bias=True)
    attention.init_weights(factor=0.5)
    assert attention.qkv.weight.std().item() == pytest.approx(256**-0.5, rel=0.03)
    assert attention.proj.weight.std().item() == pytest.approx(0.5 * 256**-0.5, rel=0.03)
    assert attention.qkv.bias.abs().max() == 0
    attention.init_weights(init_attn_std=0.1, init_proj_std=0.2)
    assert attention.qkv.weight.std().item() == pytest.approx(0.1, rel=0.03)
    assert attention.proj.weight.std().item() == pytest.approx(0.2, rel=0.03)


def test_attention_equals_its_definition() -> None:
    attention, x = make_attention(), torch.randn(2, 7, 32)
    q, k, v = attention.qkv(x).view(2, 7, 3, 4, 8).permute(2, 0, 3, 1, 4)
    weights = F.softmax(q @ k.transpose(-1, -2) / 8**0.5, dim=-1)
    torch.testing.assert_close(attention(x), attention.proj((weights @ v).transpose(1, 2).reshape(2, 7, 32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradient_of_split_heads_is_that_of_slices_and_rotations(dtype: torch.dtype, per_sample: bool) -> None:
    attention, x = make_attention(), torch.randn(2, 7, 32)
    rope = tuple(t.to(dtype) for t in tables(6))
    rope = tuple(t.expand(2, 1, -1, -1) for t in rope) if per_sample else rope
    found = {}
    for name in ("autograd", "ours"):
        qkv = attention.qkv(x).detach().requires_grad_()
        if name == "autograd":  # the plain form: slices, one rotation, slices
            heads = qkv.view(2, 7, 3, 4, 8)
            rotated = _apply_rope(heads[:, :, :2], rope)
            q, k, v = (t.transpose(1, 2) for t in (rotated[:, :, 0], rotated[:, :, 1], heads[:, :, 2]))
        else:
            q, k, v = attention._split_heads(qkv, rope)
        F.scaled_dot_product_attention(q, k, v).square().sum().backward()
        found[name] = q, k, v, qkv.grad
    for ours, plain in zip(found["ours"], found["autograd"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)


def test_chosen_rows_are_those_of_all() -> None:
    attention, x, rope, rows = make_attention(), torch.randn(3, 7, 32), tables(6), torch.tensor([20, 0, 7, 3])
    torch.testing.assert_close(attention(x, rope=rope, rows=rows), attention(x, rope=rope).flatten(0, 1)[rows])
