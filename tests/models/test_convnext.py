"""ConvNeXt: the interface it shares with the vision transformer, and what is its own."""

import pytest
import torch
from torch import nn

from dinov3.models.backbone import Backbone
from dinov3.models.convnext import ConvNeXt, LayerNorm, convnext_sizes, get_convnext_arch


def make(**options: object) -> ConvNeXt:
    model = ConvNeXt(**({"depths": [1, 2, 1, 1], "dims": [4, 6, 8, 10], "layer_scale_init_value": 0.5} | options))
    model.init_weights()
    for value in model.parameters():
        nn.init.normal_(value, std=0.3)
    return model.eval()


def test_is_a_backbone() -> None:
    model = make()
    assert isinstance(model, Backbone)
    assert model.embed_dims == [4, 6, 8, 10]
    assert model.embed_dim == 10
    assert model.wrap_units()[:3] == [model.downsample_layers[0], model.stages[0], model.downsample_layers[1]]
    in_units = {id(unit) for unit in model.checkpoint_units()}
    assert {id(layer) for layer in model.downsample_layers} <= in_units
    assert {id(block) for stage in model.stages for block in stage} <= in_units
    assert len(in_units) == 4 + 5


def test_list_equals_one_by_one() -> None:
    model, images = make(), [torch.randn(2, 3, 32, 64), torch.randn(1, 3, 64, 64)]
    masks = [torch.zeros(2, 2, dtype=torch.bool), None]
    for got, x, mask in zip(model(images, masks, is_training=True), images, masks, strict=True):
        want = model.forward_features(x)
        for key in ("x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens", "x_prenorm"):
            torch.testing.assert_close(got[key], want[key])
        assert got["masks"] is mask
    for got, x in zip(model(images), images, strict=True):
        torch.testing.assert_close(got, model(x))


def test_class_token_is_the_normed_mean_of_positions() -> None:
    model = make()
    features = model.forward_features(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(features["x_norm_clstoken"], model.norm(features["x_prenorm"].mean(dim=1)))


def test_intermediate_layers_have_the_signature_of_the_vit() -> None:
    model, images = make(), torch.randn(2, 3, 64, 96)
    outputs = model.get_intermediate_layers(
        images, n=[3, -3], reshape=True, return_class_token=True, return_extra_tokens=True
    )
    assert [tuple(t.shape) for t in outputs[0]] == [(2, 6, 8, 12), (2, 6), (2, 0, 6)]
    assert [tuple(t.shape) for t in outputs[1]] == [(2, 10, 2, 3), (2, 10), (2, 0, 10)]
    features = model.forward_features(images)
    torch.testing.assert_close(outputs[1][0].flatten(2).mT, features["x_norm_patchtokens"])
    torch.testing.assert_close(outputs[1][1], features["x_norm_clstoken"])


def test_later_stages_are_not_run() -> None:
    model = make()
    model.stages[2] = None
    assert len(model.get_intermediate_layers(torch.randn(1, 3, 8, 8), n=[0, 1])) == 2


def test_channels_first_norm_equals_channels_last() -> None:
    first, last, x = LayerNorm(6, data_format="channels_first"), LayerNorm(6), torch.randn(2, 6, 3, 5)
    with torch.no_grad():
        first.weight.normal_()
        last.weight.copy_(first.weight)
    torch.testing.assert_close(first(x), last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_drop_path_grows_with_depth_and_acts_in_training() -> None:
    model = make(drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    images = torch.randn(8, 3, 32, 32)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_valid_at_construction_and_after_the_meta_device() -> None:
    options = {"depths": [1, 1, 1, 1], "dims": [4, 6, 8, 10]}
    assert ConvNeXt(**options).eval()(torch.randn(1, 3, 32, 32)).isfinite().all()
    model = ConvNeXt(**options, device="meta")
    assert all(value.is_meta for value in model.state_dict().values())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(float("nan"))
    model.init_weights()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert (model.stages[0][0].gamma == 1e-6).all()
    assert model.norms[3] is model.norm


def test_default_sizes_are_not_shared_between_models() -> None:
    ConvNeXt(device="meta").embed_dims.append(0)
    assert len(ConvNeXt(device="meta").embed_dims) == 4


def test_errors() -> None:
    model = make()
    with pytest.raises(ValueError, match="need 32 x 32"):
        model(torch.randn(1, 3, 31, 64))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        model(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match="distinct"):
        model.get_intermediate_layers(torch.randn(1, 3, 32, 32), n=[1, 1])
    with pytest.raises(ValueError, match="4 stages"):
        make(depths=[1, 1, 1])
    with pytest.raises(ValueError, match="data_format"):
        LayerNorm(4, data_format="NCHW")
    with pytest.raises(NotImplementedError, match="convnext_tiny"):
        get_convnext_arch("convnext_giant")


def test_named_sizes() -> None:
    for name, size in convnext_sizes.items():
        model = get_convnext_arch(f"convnext_{name}")(device="meta", patch_size=16)
        assert model.embed_dims == size["dims"]
        assert [len(stage) for stage in model.stages] == size["depths"]
        assert model.patch_size == 16
