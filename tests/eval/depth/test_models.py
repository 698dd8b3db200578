"""Depth models: image sizes, dtypes, what is frozen, ranges, head files."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3.checkpointer.heads import HeadFile, save_head
from dinov3.eval.depth.config import DecoderConfig
from dinov3.eval.depth.inference import make_inference
from dinov3.eval.depth.models import (
    Depther,
    DinoVisionTransformerWrapper,
    FeaturesToDepth,
    build_depther,
    load_head_weights,
    make_depther_from_config,
    make_head,
)
from dinov3.eval.depth.models.depther import decoder_config_of, plain_decoder_config
from dinov3.eval.depth.models.dpt_head import DPTHead
from tests.eval.depth.toys import DPT, tiny_depther
from tests.helpers.backbones import tiny_convnext, tiny_vit


@pytest.mark.parametrize("head", ["linear", "dpt"])
@pytest.mark.parametrize("size", [(5, 7), (16, 16), (33, 47), (48, 17), (96, 130)])
@pytest.mark.parametrize("strategy", ["center_padding", "stretch"])
def test_any_image_size_gives_depth_of_that_size_within_range(head: str, size: tuple[int, int], strategy: str) -> None:
    from dinov3.eval.depth.config import PatchSizeAdaptationStrategy

    depther = tiny_depther(head, adapt_to_patch_size=PatchSizeAdaptationStrategy(strategy))
    images = 5 * torch.randn(2, 3, *size)
    depth = make_inference(depther, images)
    assert depth.shape == (2, 1, *size)
    assert 0.5 <= depth.min() <= depth.max() <= 10.0


def test_dpt_output_size() -> None:
    head = DPTHead([8] * 4, **DPT)  # type: ignore[arg-type]
    for h, w in ((1, 1), (2, 3), (5, 4)):
        levels = [(torch.randn(1, 8, h, w), torch.randn(1, 8)) for _ in range(4)]
        assert head(levels).shape[-2:] == (32 * -(-h // 2), 32 * -(-w // 2))
        assert head.predict(levels, rescale_to=(9, 11)).shape[-2:] == (9, 11)


def test_convnext_backbones_and_too_small_images() -> None:
    depther = build_depther(tiny_convnext(), "FOUR_EVEN_INTERVALS", 8, head_type="dpt", **DPT)  # type: ignore[arg-type]
    assert make_inference(depther, torch.randn(1, 3, 70, 90)).shape == (1, 1, 70, 90)
    with pytest.raises(ValueError, match="too small"):
        make_inference(depther, torch.randn(1, 3, 20, 90))


def test_without_adaptation_pixels_beyond_the_grid_are_dropped() -> None:
    from dinov3.eval.depth.config import PatchSizeAdaptationStrategy

    never = tiny_depther(adapt_to_patch_size=PatchSizeAdaptationStrategy.NO_ADAPTATION)
    assert never(torch.randn(1, 3, 40, 50)).shape[-2:] == (2, 3)
    assert tiny_depther()(torch.randn(1, 3, 40, 50)).shape[-2:] == (3, 4)


def test_inference_resizes_and_averages_mirror_images() -> None:
    depther = tiny_depther("dpt")
    images = torch.randn(1, 3, 40, 56)
    both = make_inference(depther, images, use_tta=True)
    mirrored = make_inference(depther, images.flip(-1), use_tta=True)
    torch.testing.assert_close(both, mirrored.flip(-1), rtol=1e-5, atol=1e-5)
    assert make_inference(depther, images, size=64).shape == (1, 1, 40, 56)
    assert make_inference(depther, images, depth_range=(3.0, 4.0)).min() >= 3.0
    with pytest.raises(ValueError, match="expected images"):
        make_inference(depther, images[0])
    with pytest.raises(ValueError, match="size is"):
        make_inference(depther, images, size=(0, 4))


def test_it_computes_in_float32_on_a_cpu_whatever_the_autocast_around() -> None:
    depther = tiny_depther("dpt")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = depther(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = depther(images)
        depther.autocast_dtype = torch.bfloat16
        asked = depther(images)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(asked, expected, rtol=0, atol=0)


def test_the_backbone_is_frozen_and_never_in_training_mode() -> None:
    depther = tiny_depther("dpt").train()
    assert depther.decoder.training
    assert not any(module.training for module in depther.encoder.backbone.modules())
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    depther(images).sum().backward()
    assert all(p.grad is None for p in depther.encoder.parameters())
    assert all(p.grad is not None for p in depther.decoder.parameters())
    assert images.grad is not None


def test_wrong_layers_and_names() -> None:
    vit = tiny_vit(embed_dim=16, depth=4)
    with pytest.raises(ValueError, match="no blocks"):
        DinoVisionTransformerWrapper(vit, [0, 4])
    with pytest.raises(ValueError, match="four level|4 levels"):
        build_depther(vit, "LAST", 8, head_type="dpt")
    with pytest.raises(ValueError, match="unknown head_type"):
        make_head(8, 4, use_batchnorm=False, use_cls_token=False, head_type="deep")
    with pytest.raises(ValueError, match="unknown bins_strategy"):
        FeaturesToDepth(bins_strategy="cubic")
    with pytest.raises(ValueError, match="unknown norm_strategy"):
        FeaturesToDepth(norm_strategy="max")
    with pytest.raises(ValueError, match="min_depth must be below"):
        FeaturesToDepth(min_depth=3, max_depth=2)
    with pytest.raises(ValueError, match="min_depth > 0"):
        FeaturesToDepth(0.0, 2.0, bins_strategy="log")(torch.randn(1, 4, 2, 2))
    with pytest.raises(ValueError, match="readout_type"):
        DPTHead([8] * 4, readout_type="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected 4 levels"):
        tiny_depther("dpt").decoder([(torch.randn(1, 32, 2, 2), torch.randn(1, 32))])


@pytest.mark.parametrize("bins", ["linear", "log", "chmv2_mixlog"])
@pytest.mark.parametrize("norm", ["linear", "softmax", "sigmoid", "chmv2_mixlog"])
def test_depths_stay_between_the_bins(bins: str, norm: str) -> None:
    to_depth = FeaturesToDepth(0.01, 40.0, bins, norm)
    depth = to_depth(30 * torch.randn(2, 12, 5, 6))
    scale = 8.0 if norm == "chmv2_mixlog" else 1.0
    top = 40.0 / (8.0 if bins == "chmv2_mixlog" else 1.0)
    assert depth.shape == (2, 1, 5, 6)
    assert 0.01 * scale * (1 - 1e-5) <= depth.min() <= depth.max() <= top * scale * (1 + 1e-5)


def test_bins_are_summed_in_float32_and_gradients_are_right() -> None:
    to_depth = FeaturesToDepth(0.01, 10.0)
    logits = torch.randn(1, 64, 3, 3)
    exact = to_depth(logits.bfloat16().float())
    torch.testing.assert_close(to_depth(logits.bfloat16()), exact, rtol=0, atol=0)
    for norm in ("linear", "softmax", "sigmoid", "chmv2_mixlog"):
        x = torch.randn(1, 5, 2, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(FeaturesToDepth(0.01, 10.0, norm_strategy=norm), (x,))


@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_every_kind_of_head_file(head: str, tmp_path: Path) -> None:
    depther = tiny_depther(head, use_batchnorm=True, use_cls_token=True)
    state = depther.decoder.state_dict()
    images = torch.randn(1, 3, 40, 40)
    expected = depther(images)
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"model": state, "optimizer": {"state": {}}, "iteration": 4}, tmp_path / "training.pth")
    config = decoder_config_of(plain_decoder_config(_config(head)))
    save_head(tmp_path / "run" / "head.pth", HeadFile("depth", state, plain_decoder_config(config), "dinov3_vits16"))
    for source in ("bare.pth", "training.pth", "run", "run/head.pth"):
        fresh = make_depther_from_config(depther.encoder.backbone, config, tmp_path / source)  # type: ignore[arg-type]
        torch.testing.assert_close(fresh(images), expected, rtol=0, atol=0)
    other = make_head([32] * 4, 8, use_batchnorm=True, use_cls_token=True, head_type=head, **_kwargs(head))
    with pytest.raises(ValueError, match="depth head .*nothing was loaded"):
        load_head_weights(other, tmp_path / "bare.pth")


def _kwargs(head: str) -> dict[str, Any]:
    return DPT if head == "dpt" else {}


def _config(head: str) -> DecoderConfig:
    return DecoderConfig(
        min_depth=0.5,
        max_depth=10.0,
        type=head,
        n_output_channels=16,
        backbone_out_layers="FOUR_LAST",
        use_batchnorm=True,
        use_cls_token=True,
        head_kwargs=_kwargs(head),
    )


def test_load_head_gives_a_ready_depther(tmp_path: Path) -> None:
    from dinov3.hub import load_head

    depther = tiny_depther("dpt", use_batchnorm=True, use_cls_token=True)
    save_head(
        tmp_path / "head.pth",
        HeadFile("depth", depther.decoder.state_dict(), plain_decoder_config(_config("dpt")), "dinov3_vits16"),
    )
    backbone = depther.encoder.backbone
    loaded = load_head(tmp_path, backbone=backbone)  # type: ignore[arg-type]
    images = torch.randn(1, 3, 24, 40)
    assert isinstance(loaded, Depther)
    torch.testing.assert_close(loaded(images), depther(images), rtol=0, atol=0)
