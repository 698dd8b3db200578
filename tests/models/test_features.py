"""Frozen features, and how images fit the patch grid."""

import pytest
import torch
from torch import nn

from dinov3.models.convnext import ConvNeXt
from dinov3.models.features import BackboneLayersSet, FrozenFeatures, layer_indices, pad_to_patches, resize_to_patches
from dinov3.models.vision_transformer import DinoVisionTransformer
from dinov3.utils.dtype import as_torch_dtype


@pytest.fixture(params=["vit", "convnext"])
def backbone(request: pytest.FixtureRequest) -> nn.Module:
    if request.param == "convnext":
        model: nn.Module = ConvNeXt(depths=[1, 1, 1, 1], dims=[4, 6, 8, 10])
    else:
        model = DinoVisionTransformer(embed_dim=16, depth=4, num_heads=2, patch_size=8, n_storage_tokens=2)
    model.init_weights()
    return model


@pytest.mark.parametrize(
    ("layers", "n_blocks", "expected"),
    [
        ("LAST", 12, [11]),
        (BackboneLayersSet.FOUR_LAST, 12, [8, 9, 10, 11]),
        ("four_even_intervals", 12, [2, 5, 8, 11]),
        ("FOUR_EVEN_INTERVALS", 40, [9, 19, 29, 39]),
        ("FOUR_EVEN_INTERVALS", 24, [4, 11, 17, 23]),  # the published quirk
        (2, 12, [10, 11]),
        ([-1, 0], 12, [0, 11]),
    ],
)
def test_layer_indices(layers: object, n_blocks: int, expected: list[int]) -> None:
    assert layer_indices(layers, n_blocks) == expected


def test_unknown_layers() -> None:
    with pytest.raises(ValueError, match="FIRST"):
        layer_indices("FIRST", 12)
    with pytest.raises(ValueError, match="from 1 to 3"):
        layer_indices("FOUR_LAST", 3)


def test_features_are_the_backbones_own(backbone: nn.Module) -> None:
    extractor, images = FrozenFeatures(backbone, [0, 3], norm=False), torch.randn(2, 3, 64, 32)
    features = extractor(images)
    outputs = backbone.get_intermediate_layers(images, [0, 3], reshape=True, return_class_token=True, norm=False)
    for got, (maps, class_token) in zip(features.layers, outputs, strict=True):
        assert torch.equal(got.map, maps)
        assert torch.equal(got.class_token, class_token)
        assert torch.equal(got.tokens, maps.flatten(2).mT)
        assert got.storage_tokens.shape[1] == backbone.n_storage_tokens
    assert extractor.embed_dims == [backbone.embed_dims[0], backbone.embed_dims[3]]
    assert features.valid.all()


def test_backbone_stays_frozen_and_in_evaluation_mode(backbone: nn.Module) -> None:
    extractor = FrozenFeatures(backbone.train())
    extractor.train()
    assert extractor.training
    assert not backbone.training
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    assert not extractor(images).layers[0].map.requires_grad


@pytest.mark.parametrize(("fit", "side"), [("crop", 64), ("pad", 96), ("resize", 96)])
def test_fit(backbone: nn.Module, fit: str, side: int) -> None:
    features = FrozenFeatures(backbone, fit=fit)(torch.randn(1, 3, 70, 96))
    stride = backbone.stride
    height = {8: {"crop": 64, "pad": 72, "resize": 72}[fit]}.get(stride, side) // stride
    assert features.layers[0].map.shape[-2:] == (height, 96 // stride)
    assert features.valid.shape == (1, height, 96 // stride)


def test_autocast_gives_the_dtype_asked_for(backbone: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(1, 3, 32, 32)
    monkeypatch.setattr("dinov3.models.features.resolve_compute_dtype", lambda dtype, _: as_torch_dtype(dtype))
    seen = []
    next(m for m in backbone.modules() if isinstance(m, nn.Linear)).register_forward_hook(
        lambda module, args, out: seen.append(out.dtype)
    )
    FrozenFeatures(backbone, autocast_dtype="bf16")(images)
    FrozenFeatures(backbone)(images)
    assert seen == [torch.bfloat16, torch.float32]


def test_wrong_fit(backbone: nn.Module) -> None:
    with pytest.raises(ValueError, match="'pad'"):
        FrozenFeatures(backbone, fit="stretch")


def test_padding_keeps_every_pixel() -> None:
    images = torch.randn(2, 3, 10, 9)
    padded, valid = pad_to_patches(images, 4, value=7.0)
    assert padded.shape == (2, 3, 12, 12)
    assert torch.equal(padded[..., :10, :9], images)
    assert (padded[..., 10:, :] == 7).all()
    assert (padded[..., 9:] == 7).all()
    assert valid.shape == (2, 3, 3)
    assert valid.all()
    centred, _ = pad_to_patches(images, 4, position="center")
    assert torch.equal(centred[..., 1:11, 1:10], images)


def test_multiples_are_not_padded() -> None:
    images = torch.randn(1, 3, 8, 4)
    assert torch.equal(pad_to_patches(images, 4).images, images)
    assert resize_to_patches(images, 4) is images


def test_small_images_become_one_patch() -> None:
    padded, valid = pad_to_patches(torch.randn(1, 3, 1, 2), 4)
    assert padded.shape == (1, 3, 4, 4)
    assert valid.tolist() == [[[True]]]


def test_cover_decides_which_patches_are_valid() -> None:
    images = torch.randn(1, 3, 6, 5)  # 1.5 patches high, 1.25 wide
    _, valid = pad_to_patches(images, 4, min_cover=0.3)
    assert valid.tolist() == [[[True, False], [True, False]]]
    _, valid = pad_to_patches(images, 4, min_cover=0.5)
    assert valid.tolist() == [[[True, False], [False, False]]]


def test_images_of_several_sizes_share_a_canvas() -> None:
    images = [torch.randn(3, 4, 4), torch.randn(3, 9, 5)]
    padded, valid = pad_to_patches(images, 4)
    assert padded.shape == (2, 3, 12, 8)
    assert valid[0].tolist() == [[True, False], [False, False], [False, False]]
    assert valid[1].all()
    with pytest.raises(ValueError, match="at least one image"):
        pad_to_patches([], 4)
    with pytest.raises(ValueError, match="'center'"):
        pad_to_patches(images, 4, position="left")


def test_resizing_enlarges_to_multiples() -> None:
    assert resize_to_patches(torch.ones(2, 2, 3, 9, 8), 4).shape == (2, 2, 3, 12, 8)
    torch.testing.assert_close(resize_to_patches(torch.ones(1, 3, 9, 8), 4), torch.ones(1, 3, 12, 8))
