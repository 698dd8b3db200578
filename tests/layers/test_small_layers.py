"""Feed-forward networks, norms, patch embedding, the DINO head, fp8 linears."""

import logging

import pytest
import torch
from torch import nn

from dinov3.layers import LinearKMaskedBias, Mlp, PatchEmbed, RMSNorm, SwiGLUFFN, convert_linears_to_fp8
from dinov3.layers.dino_head import DINOHead
from dinov3.layers.fp8_linear import Fp8Linear, Fp8LinearKMaskedBias
from dinov3.layers.patch_embed import log_cropping


@pytest.mark.parametrize(("hidden", "align", "expected"), [(96, 8, 64), (100, 8, 72), (100, 64, 128), (3072, 64, 2048)])
def test_swiglu_width(hidden: int, align: int, expected: int) -> None:
    assert SwiGLUFFN(16, hidden, align_to=align).w1.out_features == expected


def test_lists_equal_one_by_one() -> None:
    x_list = [torch.randn(2, 5, 16), torch.randn(3, 16)]
    for ffn in (Mlp(16, 32, 8), SwiGLUFFN(16, 32)):
        for got, x in zip(ffn.forward_list(x_list), x_list, strict=True):
            torch.testing.assert_close(got, ffn(x))


def test_mlp_dropout_acts_in_training() -> None:
    mlp, x = Mlp(16, drop=0.5), torch.randn(4, 16)
    assert not torch.equal(mlp.train()(x), mlp(x))
    assert torch.equal(mlp.eval()(x), mlp(x))


def test_rms_norm_is_scale_free_and_computes_in_float32() -> None:
    norm, x = RMSNorm(16, eps=0.0), torch.randn(3, 16)
    torch.testing.assert_close(norm(x), norm(7 * x))
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(3))
    assert norm(x.half() * 1000).isfinite().all()


def test_patch_embedding_sees_whole_patches_only() -> None:
    embed, images = PatchEmbed(patch_size=4, embed_dim=8), torch.randn(2, 3, 11, 9)
    assert torch.equal(embed(images), embed(images[:, :, :8, :8]))
    grid = PatchEmbed(patch_size=4, embed_dim=8, flatten_embedding=False)
    grid.load_state_dict(embed.state_dict())
    assert torch.equal(grid(images).flatten(1, 2), embed(images))


def test_patch_embedding_equals_a_linear_layer_on_patches() -> None:
    embed, images = PatchEmbed(patch_size=(2, 4), embed_dim=8), torch.randn(2, 3, 4, 8)
    patches = images.unfold(2, 2, 2).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    expected = nn.functional.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias)
    torch.testing.assert_close(embed(images), expected, atol=1e-5, rtol=1e-5)


def test_dropped_pixels_are_logged_once_with_sizes_and_a_remedy(caplog: pytest.LogCaptureFixture) -> None:
    log_cropping.cache_clear()
    embed = PatchEmbed(patch_size=4, embed_dim=8)
    with caplog.at_level(logging.INFO, logger="dinov3"):
        embed(torch.randn(1, 3, 8, 8))
        assert not caplog.records
        embed(torch.randn(1, 3, 11, 9))
        embed(torch.randn(1, 3, 11, 9))
    (record,) = caplog.records
    assert "11 x 9" in record.message
    assert "8 x 8" in record.message
    assert "pad_to_patches" in record.message


def test_bad_images() -> None:
    embed = PatchEmbed(patch_size=4, embed_dim=8)
    with pytest.raises(ValueError, match="3 x 8 pixels is smaller than one patch of 4 x 4"):
        embed(torch.randn(1, 3, 3, 8))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        embed(torch.randn(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        embed(torch.randn(3, 8, 8))


def test_patch_embedding_reset() -> None:
    embed = PatchEmbed(patch_size=4, in_chans=2, embed_dim=64)
    embed.reset_parameters()
    bound = (2 * 16) ** -0.5
    for value in (embed.proj.weight, embed.proj.bias):
        assert value.abs().max() <= bound
    assert embed.proj.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_dino_head_normalises_before_the_prototypes() -> None:
    head, x = DINOHead(8, 5, nlayers=2, hidden_dim=12, bottleneck_dim=6), torch.randn(4, 8)
    head.init_weights()
    z = head(x, no_last_layer=True)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(head(z, only_last_layer=True), head(x))
    assert head(x.new_zeros(2, 8)).isfinite().all()
    assert head.half()(torch.zeros(2, 8).half(), no_last_layer=True).isfinite().all()


def test_dino_head_initialisation() -> None:
    head = DINOHead(64, 32, hidden_dim=256, bottleneck_dim=64, use_bn=True)
    head.init_weights()
    for name, value in head.named_parameters():
        if name.endswith("weight") and value.ndim == 2:
            assert value.std().item() == pytest.approx(0.02, rel=0.1)
        elif name.endswith("bias"):
            assert value.abs().max() == 0


def test_fp8_conversion_shares_tensors_and_keeps_masks() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 128), "b": LinearKMaskedBias(64, 192), "c": nn.Linear(64, 65)})
    parameters, mask = dict(model.named_parameters()), model["b"].bias_mask
    assert convert_linears_to_fp8(model, filter="[ab]") is model
    assert type(model["a"]) is Fp8Linear
    assert type(model["b"]) is Fp8LinearKMaskedBias
    assert type(model["c"]) is nn.Linear
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert model["b"].bias_mask is mask


def test_fp8_product_is_close_and_differentiable() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 128), torch.randn(5, 3, 64)
    expected = linear(x)
    fp8 = convert_linears_to_fp8(nn.Sequential(linear), filter="0")
    x.requires_grad_()
    out = fp8(x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() / expected.norm() < 0.06
    out.float().sum().backward()
    assert (x.grad - linear.weight.sum(0)).norm() / (15**0.5 * linear.weight.sum(0).norm()) < 0.1
    torch.testing.assert_close(linear.bias.grad, torch.full((128,), 15.0))


def test_fp8_refusals() -> None:
    with pytest.raises(RuntimeError, match="multiples of 64"):
        convert_linears_to_fp8(nn.Sequential(nn.Linear(64, 65)), filter="0")
    with pytest.raises(AssertionError, match="nothing was converted"):
        convert_linears_to_fp8(nn.Sequential(nn.Linear(64, 64)), filter="blocks")
    special = type("Special", (nn.Linear,), {})
    with pytest.raises(TypeError, match="Special"):
        convert_linears_to_fp8(nn.Sequential(special(64, 64)), filter="0")
