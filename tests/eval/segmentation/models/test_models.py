"""Decoders, the adapter and the Mask2Former head at tiny size: sizes of images, what is frozen, what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.eval.segmentation.inference import slide_inference
from dinov3.eval.segmentation.models import BackboneLayersSet, FeatureDecoder, build_segmentation_decoder
from dinov3.eval.segmentation.models.backbone.dinov3_adapter import DINOv3_Adapter
from dinov3.eval.segmentation.models.heads.linear_head import LinearHead
from dinov3.eval.segmentation.models.heads.mask2former_head import Mask2FormerHead
from dinov3.eval.segmentation.models.heads.mask2former_transformer_decoder import (
    MultiScaleMaskedTransformerDecoder,
    attention_mask,
)
from dinov3.eval.segmentation.models.utils.batch_norm import get_norm
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer

K = 3


def tiny_backbone(patch_size: int = 16) -> DinoVisionTransformer:
    torch.manual_seed(0)
    return DinoVisionTransformer(
        img_size=64, patch_size=patch_size, embed_dim=32, depth=4, num_heads=2, ffn_ratio=1, drop_path_rate=0.5
    )


def tiny_convnext() -> ConvNeXt:
    return ConvNeXt(depths=[1, 1, 1, 1], dims=[8, 16, 24, 32])


@pytest.fixture(scope="module")
def m2f() -> FeatureDecoder:
    return build_segmentation_decoder(tiny_backbone(), decoder_type="m2f", hidden_dim=64, num_classes=K).eval()


def linear(backbone: nn.Module | None = None, **options: Any) -> FeatureDecoder:
    return build_segmentation_decoder(backbone or tiny_backbone(), num_classes=K, **options).eval()


# Images of any size.


@pytest.mark.parametrize("size", [(32, 32), (33, 65), (7, 90)])
def test_predictions_have_the_size_asked_for_whatever_the_image(m2f: FeatureDecoder, size: tuple[int, int]) -> None:
    image = torch.randn(1, 3, *size)
    assert linear().predict(image, rescale_to=size).shape == (1, K, *size)
    out = m2f.predict(image, rescale_to=size)
    assert out["pred_masks"].shape == (1, 100, *size)
    assert out["pred_logits"].shape == (1, 100, K + 1)


def test_sliding_over_a_small_and_long_image(m2f: FeatureDecoder) -> None:
    scores = slide_inference(torch.randn(1, 3, 20, 70), m2f, "m2f", K, (96, 96), (64, 64))
    assert scores.shape == (1, K, 20, 70)
    assert scores.isfinite().all()


def test_odd_images_are_enlarged_not_cropped() -> None:
    decoder = linear()
    image = torch.zeros(1, 3, 40, 40)
    edge = image.clone()
    edge[..., 33:] = 1.0  # beyond the last whole patch
    assert not torch.equal(decoder.predict(image), decoder.predict(edge))


def test_the_adapter_itself_refuses_odd_images(m2f: FeatureDecoder) -> None:
    with pytest.raises(ValueError, match="multiples of 32, got 64 x 48"):
        m2f.segmentation_model[0](torch.randn(1, 3, 64, 48))


@pytest.mark.parametrize("patch_size", [14, 8])
def test_mask2former_on_other_patches(patch_size: int) -> None:
    backbone = tiny_backbone(patch_size)
    decoder = build_segmentation_decoder(backbone, decoder_type="m2f", hidden_dim=32, num_classes=K).eval()
    assert decoder(torch.randn(1, 3, 64, 32))["pred_masks"].shape == (1, 100, 16, 8)


def test_images_of_a_batch_do_not_mix(m2f: FeatureDecoder) -> None:
    images = torch.randn(2, 3, 64, 32)
    together = m2f.predict(images, (16, 16))
    alone = m2f.predict(images[1:], (16, 16))
    torch.testing.assert_close(together["pred_masks"][1:], alone["pred_masks"], rtol=1e-3, atol=1e-3)


# What is trained.


@pytest.mark.parametrize("decoder_type", ["linear", "m2f"])
def test_only_the_head_is_trained_and_the_backbone_never_leaves_evaluation(decoder_type: str) -> None:
    options: dict[str, Any] = {"decoder_type": decoder_type, "hidden_dim": 32, "num_classes": K}
    decoder = build_segmentation_decoder(tiny_backbone(), **options).train()
    out = decoder(torch.randn(2, 3, 64, 64))
    loss = out.sum() if isinstance(out, Tensor) else out["pred_masks"].sum() + out["pred_logits"].sum()
    loss.backward()
    frozen = [name for name, p in decoder.named_parameters() if not p.requires_grad]
    assert frozen
    assert all(".0.feature_model." in name or ".0.backbone." in name for name in frozen)
    assert all(p.grad is not None for name, p in decoder.named_parameters() if name.endswith("conv.weight"))
    backbone = next(module for module in decoder.modules() if isinstance(module, DinoVisionTransformer))
    assert all(p.grad is None for p in backbone.parameters())
    assert not any(module.training for module in backbone.modules())


def test_recomputing_the_extractors_changes_no_gradient() -> None:
    x, grads = torch.randn(2, 3, 64, 64), []
    for with_cp in (False, True):
        torch.manual_seed(0)
        adapter = DINOv3_Adapter(tiny_backbone(), [0, 1, 2, 3], conv_inplane=4, deform_num_heads=4, with_cp=with_cp)
        torch.manual_seed(1)  # drop path
        sum(out.square().mean() for out in adapter.train()(x).values()).backward()
        grads.append({name: p.grad for name, p in adapter.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[1][name], grad) for name, grad in grads[0].items())


# Options of the linear decoder.


def test_options_reach_the_linear_head_and_the_features() -> None:
    plain, bare = linear(), linear(use_batchnorm=False, use_cls_token=True)
    assert isinstance(bare.segmentation_model[1].batchnorm_layer, nn.Identity)
    assert bare.segmentation_model[1].conv.in_channels == 2 * plain.segmentation_model[1].conv.in_channels
    assert bare.predict(torch.randn(1, 3, 32, 32), (8, 8)).shape == (1, K, 8, 8)
    image = torch.randn(1, 3, 32, 32)
    normed, raw = (linear(use_backbone_norm=use).segmentation_model[0](image)[0] for use in (True, False))
    assert not torch.allclose(normed, raw)


def test_a_linear_head_on_a_convolutional_network_takes_the_width_of_each_layer() -> None:
    decoder = linear(tiny_convnext(), backbone_out_layers=BackboneLayersSet.FOUR_LAST)
    assert decoder.segmentation_model[1].in_channels == [8, 16, 24, 32]
    assert decoder.predict(torch.randn(1, 3, 50, 70), (50, 70)).shape == (1, K, 50, 70)


def test_dropout_is_for_training_only() -> None:
    head = LinearHead([4], K, dropout=0.9)
    features = [torch.randn(2, 4, 3, 3)]
    head.eval()
    torch.testing.assert_close(head(features), head.predict(features, (3, 3)))
    head.train()
    head.batchnorm_layer.eval()
    assert not torch.equal(head(features), head(features))
    assert torch.equal(head.predict(features, (3, 3)), head.predict(features, (3, 3)))


def test_vectors_are_maps_of_one_cell() -> None:
    head = LinearHead([4, 2], K).eval()
    assert head([torch.randn(2, 4), torch.randn(2, 2)]).shape == (2, K, 1, 1)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([torch.zeros(1, 4, 2, 2)], "expected 2 features, got 1"),
        ([torch.zeros(1, 4, 2, 2), torch.zeros(1, 3, 2, 2)], "features of 7 channels for a head of 6"),
    ],
)
def test_other_features_than_the_head_was_made_for_are_refused(features: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearHead([4, 2], K)(features)


# Mask2Former.


def test_queries_look_inside_their_masks_or_everywhere() -> None:
    logits = torch.full((1, 2, 4, 4), -1.0)
    logits[0, 0, :2, :2] = 1.0
    allowed = attention_mask(logits, (2, 2))
    assert allowed.shape == (1, 1, 2, 4)
    assert allowed[0, 0].tolist() == [[True, False, False, False], [True, True, True, True]]


def test_masks_guide_without_gradient() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    assert not attention_mask(logits, (2, 2)).requires_grad


@pytest.mark.parametrize("pre_norm", [False, True])
def test_projections_are_there_only_where_needed(pre_norm: bool) -> None:
    options: dict[str, Any] = {
        "num_classes": K,
        "num_queries": 5,
        "nheads": 2,
        "dim_feedforward": 16,
        "dec_layers": 2,
        "pre_norm": pre_norm,
        "mask_dim": 6,
    }
    maps = [torch.randn(2, 16, side, side) for side in (1, 2, 4)]
    for width, enforce, n_keys in ((16, False, 0), (16, True, 6), (32, False, 6)):
        module = MultiScaleMaskedTransformerDecoder(16, hidden_dim=width, enforce_input_project=enforce, **options)
        assert sum(name.startswith("input_proj") for name in module.state_dict()) == n_keys
        out = module(maps, torch.randn(2, 6, 8, 8))
        assert out["pred_masks"].shape == (2, 5, 8, 8)
        assert len(out["aux_outputs"]) == 2
    with pytest.raises(ValueError, match="expected 3 maps, got 2"):
        module(maps[:2], torch.randn(2, 6, 8, 8))
    with pytest.raises(ValueError, match="every mask has a class"):
        MultiScaleMaskedTransformerDecoder(16, False, hidden_dim=16, enforce_input_project=False, **options)


# What is refused.


def test_what_no_decoder_can_be_built_from() -> None:
    with pytest.raises(ValueError, match="decoder_type is 'linear' or 'm2f', got 'dpt'"):
        build_segmentation_decoder(tiny_backbone(), decoder_type="dpt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="four interaction_indexes, got \\[3\\]"):
        build_segmentation_decoder(tiny_backbone(), BackboneLayersSet.LAST, "m2f", hidden_dim=32)
    with pytest.raises(ValueError, match="patches of one size, such as a ViT; got ConvNeXt"):
        build_segmentation_decoder(tiny_convnext(), decoder_type="m2f", hidden_dim=32)
    shape = {str(i): [8, 4, 4, 4] for i in range(1, 5)}
    with pytest.raises(ValueError, match="hidden_dim must be a multiple of 32"):
        Mask2FormerHead(shape, hidden_dim=48)
    with pytest.raises(ValueError, match="'multi_scale_pixel_decoder' only, got 'res5'"):
        Mask2FormerHead(shape, hidden_dim=32, transformer_in_feature="res5")


def test_norms_by_name() -> None:
    x = torch.randn(2, 32, 3, 3)
    for name in ("BN", "SyncBN", "FrozenBN", "GN", "LN"):
        norm = get_norm(name, 32)
        assert norm is not None
        assert norm(x).shape == x.shape
    assert get_norm("", 32) is None
    assert isinstance(get_norm(nn.BatchNorm2d, 32), nn.BatchNorm2d)
    with pytest.raises(ValueError, match="unknown norm 'XN'; known: BN, SyncBN"):
        get_norm("XN", 32)
