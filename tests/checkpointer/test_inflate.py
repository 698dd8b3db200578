from typing import Any

import pytest
import torch
from torch import nn

from dinov3.checkpointer.inflate import inflate_patch_embedding
from dinov3.checkpointer.weights import load_weights
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer


def vit(in_chans: int) -> nn.Module:
    torch.manual_seed(in_chans)
    model = DinoVisionTransformer(patch_size=4, embed_dim=16, depth=1, num_heads=2, in_chans=in_chans)
    model.init_weights()
    return model.eval()


def convnext(in_chans: int) -> nn.Module:
    torch.manual_seed(in_chans)
    model = ConvNeXt(in_chans=in_chans, depths=[1, 1, 1, 1], dims=[4, 8, 8, 8])
    model.init_weights()
    return model.eval()


@pytest.mark.parametrize("make", [vit, convnext])
@pytest.mark.parametrize("n_channels", [1, 2, 5, 13])
def test_images_of_equal_channels_give_what_their_grey_images_gave(make: Any, n_channels: int) -> None:
    rgb, other = make(3), make(n_channels)
    load_weights(other, inflate_patch_embedding(rgb.state_dict(), other.state_dict()))
    grey = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        expected, features = rgb(grey.expand(-1, 3, -1, -1)), other(grey.expand(-1, n_channels, -1, -1))
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


def test_colours_keep_their_filters_wherever_they_are() -> None:
    state = {"backbone.patch_embed.proj.weight": torch.rand(2, 3, 4, 4), "cls_token": torch.rand(1, 1, 2)}
    like = {"backbone.patch_embed.proj.weight": torch.empty(2, 6, 4, 4)}
    inflated = inflate_patch_embedding(state, like, rgb=(3, 2, 1))
    weight = inflated["backbone.patch_embed.proj.weight"]
    torch.testing.assert_close(weight[:, [3, 2, 1]], state["backbone.patch_embed.proj.weight"] / 2)
    torch.testing.assert_close(weight[:, 5], state["backbone.patch_embed.proj.weight"].mean(1) / 2)
    assert inflated["cls_token"] is state["cls_token"]
    for rgb in ((0, 1, 6), (0, 1, 1), (0, 1)):
        with pytest.raises(ValueError, match="rgb must be three different channels of 6"):
            inflate_patch_embedding(state, like, rgb=rgb)


def test_weights_that_fit_are_passed_on() -> None:
    for n_channels in (3, 5):
        state = {"patch_embed.proj.weight": torch.rand(2, n_channels, 4, 4)}
        for like in (state, {"patch_embed.proj.weight": torch.empty(2, 3, 4, 4)}, {}):
            assert inflate_patch_embedding(state, like)["patch_embed.proj.weight"] is state["patch_embed.proj.weight"]
