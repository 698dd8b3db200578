"""Transformer blocks and stochastic depth."""

import pytest
import torch
from torch import nn

from dinov3.layers import CausalSelfAttentionBlock, LayerScale, SelfAttentionBlock
from dinov3.layers.drop_path import DropPath, add_to_random_subset, drop_path


def make(**options: object) -> SelfAttentionBlock:
    return SelfAttentionBlock(**({"dim": 16, "num_heads": 2, "init_values": 0.5} | options))


def test_list_equals_one_by_one() -> None:
    block, x_list = make(), [torch.randn(2, 5, 16), torch.randn(3, 4, 16)]
    ropes = [(torch.randn(4, 8), torch.randn(4, 8)), None]
    for got, x, rope in zip(block(x_list, ropes), x_list, ropes, strict=True):
        torch.testing.assert_close(got, block(x, rope))
    assert isinstance(block(x_list), list)


@pytest.mark.parametrize("scale", [0.5, None])
def test_block_is_two_scaled_residual_branches(scale: float | None) -> None:
    block, x = make(init_values=scale), torch.randn(2, 5, 16)
    y = x + block.ls1(block.attn(block.norm1(x)))
    torch.testing.assert_close(block(x), y + block.ls2(block.mlp(block.norm2(y))))
    assert ("ls1.gamma" in block.state_dict()) == (scale is not None)


def test_residual_stream_stays_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make()(torch.randn(2, 5, 16)).dtype == torch.float32
        assert make(init_values=None)(torch.randn(2, 5, 16)).dtype == torch.float32


def test_stochastic_depth_touches_a_subset_and_keeps_the_mean() -> None:
    x = torch.zeros(10, 3)
    seen = []

    def branch(samples: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        seen.append(indices)
        return torch.ones_like(samples)

    out = add_to_random_subset(x, branch, 0.35)
    assert len(seen[0]) == 6
    assert len(set(seen[0].tolist())) == 6
    torch.testing.assert_close(out[seen[0]], torch.full((6, 3), 10 / 6))
    torch.testing.assert_close(out.sum(), torch.tensor(30.0))
    add_to_random_subset(x[:1], branch, 0.9)
    assert len(seen[1]) == 1  # never nothing


def test_stochastic_depth_of_a_block_acts_in_training_only() -> None:
    block, x = make(drop_path=0.5), torch.randn(8, 5, 16)
    unchanged = (block.train()(x) == x).flatten(1).all(dim=1).sum()
    assert unchanged < 8
    plain = make()
    plain.load_state_dict(block.state_dict())
    torch.testing.assert_close(block.eval()(x), plain(x))


def test_stochastic_depth_takes_the_tables_of_its_samples() -> None:
    """The samples that went through the branch were rotated by their own tables."""
    block, x = make(drop_path=0.5), torch.randn(4, 5, 16)
    rope = (torch.randn(4, 1, 4, 8), torch.randn(4, 1, 4, 8))
    block.mlp = nn.Identity()
    nn.init.zeros_(block.ls2.gamma)
    out = block.train()(x, rope)
    changed = (out != x).flatten(1).any(dim=1)
    expected = x + 2 * block.ls1(block.attn(block.norm1(x), rope=rope))
    assert changed.sum() == 2
    torch.testing.assert_close(out[changed], expected[changed])


def test_drop_path_zeroes_samples_and_keeps_the_mean() -> None:
    x = torch.ones(4000, 2, 2)
    out = drop_path(x, 0.25, training=True)
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert (out[:, :1, :1] == out).all()
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)
    assert set(drop_path(x, 0.25, training=True, scale_by_keep=False).unique().tolist()) == {0.0, 1.0}
    assert drop_path(x.bfloat16(), 0.25, training=True).dtype == torch.bfloat16
    assert DropPath(0.5).eval()(x) is x
    assert (DropPath(1.0).train()(x) == 0).all()
    with pytest.raises(ValueError, match="probability"):
        DropPath(1.5)


def test_causal_block_initialisation_sets_layer_scales_norms_and_biases() -> None:
    block = CausalSelfAttentionBlock(64, 4, ls_init_value=0.25)
    for module in (block.ls1, block.ls2):
        nn.init.zeros_(module.gamma)
    nn.init.zeros_(block.ffn_norm.weight)
    block.init_weights(factor=0.5)
    assert (block.ls1.gamma == 0.25).all()
    assert (block.ls2.gamma == 0.25).all()
    assert (block.ffn_norm.weight == 1).all()
    assert not block.feed_forward.fc1.bias.any()
    assert not block.feed_forward.fc2.bias.any()
    assert block.feed_forward.fc1.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert block.feed_forward.fc2.weight.std().item() == pytest.approx(0.5 * 64**-0.5, rel=0.05)
    assert block.attention.qkv.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)


def test_everything_is_created_on_the_device_asked_for() -> None:
    block = make(mask_k_bias=True, qkv_bias=True, device="meta")
    assert all(value.is_meta for value in block.state_dict().values())


def test_layer_scale() -> None:
    x = torch.randn(2, 4)
    assert torch.equal(LayerScale(4, init_values=2.0)(x), 2 * x)
    with torch.no_grad():
        same = LayerScale(4, init_values=2.0, inplace=True)(x)
    assert same is x
