"""Features with one call, and the attention that made them."""

import pytest
import torch
from torch import Tensor, nn

from dinov3.models.convnext import get_convnext_arch
from dinov3.models.extract import extract_features
from dinov3.models.vision_transformer import DinoVisionTransformer

IMAGES = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(0))


def _vit() -> DinoVisionTransformer:
    model = DinoVisionTransformer(
        embed_dim=32,
        depth=3,
        num_heads=2,
        ffn_ratio=2.0,
        patch_size=4,
        n_storage_tokens=2,
        layerscale_init=0.5,
        mask_k_bias=True,
        qkv_bias=True,
        pos_embed_rope_dtype="fp32",
    )
    model.init_weights()
    for value in model.parameters():
        nn.init.normal_(value, std=0.2)
    return model.eval()


def test_features_are_those_of_the_backbone() -> None:
    model = _vit()
    found = extract_features(model, IMAGES, [0, 2], reshape=True, norm=False)
    expected = model.get_intermediate_layers(
        IMAGES, [0, 2], reshape=True, norm=False, return_class_token=True, return_extra_tokens=True
    )
    assert [patches.shape for patches in found.patches] == [(2, 32, 3, 5)] * 2
    assert found.attention == ()
    for index, tensors in enumerate(expected):
        for got, tensor in zip(found[:3], tensors, strict=True):
            torch.testing.assert_close(got[index], tensor)
            assert not got[index].requires_grad


def test_attention_explains_what_the_layer_gave() -> None:
    model = _vit()
    attention_of: dict[int, tuple[Tensor, Tensor]] = {}
    for index, block in enumerate(model.blocks):
        block.attn.register_forward_hook(  # type: ignore[operator, union-attr]
            lambda module, args, output, index=index: attention_of.update({index: (args[0], output)})
        )
    found = extract_features(model, IMAGES, 2, return_attention=True)
    assert len(found.attention) == 2
    for index, weights in zip((1, 2), found.attention, strict=True):
        assert weights.shape == (2, 2, 1 + 2 + 15, 18)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 18))
        tokens, output = attention_of[index]
        attn = model.blocks[index].attn
        values = attn.qkv(tokens)[..., 64:].view(2, 18, 2, 16).transpose(1, 2)  # type: ignore[operator, union-attr]
        expected = attn.proj((weights @ values).transpose(1, 2).flatten(2))  # type: ignore[operator, union-attr]
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_hooks_do_not_stay() -> None:
    model = _vit()
    extract_features(model, IMAGES, return_attention=True)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_backbone_without_attention_says_so() -> None:
    model = get_convnext_arch("convnext_tiny")(depths=[1, 1, 1, 1], dims=[8, 8, 8, 8])
    images = torch.zeros(1, 3, 64, 64)
    assert extract_features(model, images).class_tokens[0].shape == (1, 8)
    with pytest.raises(ValueError, match="no self-attention"):
        extract_features(model, images, return_attention=True)
