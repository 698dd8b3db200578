"""Depth models of the hub: keys of the released heads, strict loading, preprocessing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hubconf
from dinov3.eval.depth import models as depth_models
from dinov3.hub import depthers
from dinov3.hub.depthers import DepthWeights, _get_depther_config, dinov3_vit7b16_dd, dinov3_vitl16_chmv2
from tests.golden.cases import golden_dir

MANIFESTS: dict[str, Any] = json.loads((golden_dir() / "depth_state_dicts.json").read_text())
ENTRIES = [name for name in MANIFESTS if name.startswith("dinov3_")]


def describe(state: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    return {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state.items()}


@pytest.fixture(scope="module", params=ENTRIES)
def on_meta(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    with torch.device("meta"):
        return getattr(hubconf, request.param)(pretrained=False), MANIFESTS[request.param]


def test_state_dict_is_that_of_the_released_files(on_meta: tuple[Any, Any]) -> None:
    depther, want = on_meta
    expected = {
        want[f"{part}_prefix"] + key: value
        for part in ("backbone", "head")
        for key, value in want[f"{part}_checkpoint"].items()
    }
    assert describe(depther.state_dict()) == expected
    assert sum(p.numel() for p in depther.decoder.parameters()) == want["head_parameters"]
    assert depther.encoder.backbone_out_indices == want["out_indices"]
    assert depther.encoder.embed_dims == want["embed_dims"]


def test_only_the_head_is_trained_and_the_model_is_in_evaluation_mode(on_meta: tuple[Any, Any]) -> None:
    depther, _ = on_meta
    assert {name.partition(".")[0] for name, p in depther.named_parameters() if p.requires_grad} == {"decoder"}
    assert not depther.training


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name.startswith("linear")])
def test_published_linear_heads(name: str) -> None:
    from dinov3.eval.depth.models import make_head

    want = MANIFESTS[name]
    with torch.device("meta"):
        head = make_head(want["embed_dims"], 256, use_batchnorm=True, use_cls_token=False, head_type="linear")
    assert describe(head.state_dict()) == want["head_checkpoint"]
    assert sum(p.numel() for p in head.parameters()) == want["head_parameters"]


def test_depth_range_and_preprocessing() -> None:
    from PIL import Image

    with torch.device("meta"):
        depther = dinov3_vit7b16_dd(pretrained=False, depth_range=(0.5, 20.0))
        canopy = dinov3_vitl16_chmv2(False)
    assert (depther.features_to_depth.min_depth, depther.features_to_depth.max_depth) == (0.5, 20.0)
    assert (canopy.features_to_depth.bins_strategy, canopy.features_to_depth.max_depth) == ("chmv2_mixlog", 96.0)
    pixels = canopy.make_transform()(Image.new("RGB", (50, 30), (255, 255, 255)))  # type: ignore[operator]
    assert pixels.shape == (3, 30, 50)
    torch.testing.assert_close(
        pixels[:, 0, 0], (1 - torch.tensor([0.420, 0.411, 0.296])) / torch.tensor([0.213, 0.156, 0.143])
    )
    assert depther.make_transform(64)(Image.new("RGB", (50, 30))).shape == (3, 64, 64)  # type: ignore[operator]


def test_head_of_other_backbones() -> None:
    config = _get_depther_config("dinov3_vitl16", depth_range=(0.1, 5.0))
    assert config.backbone_out_layers == [4, 11, 17, 23]
    assert config.head_kwargs["post_process_channels"] == [1024] * 4
    with pytest.raises(ValueError, match="only for ViT-7B and ViT-L"):
        _get_depther_config("dinov3_vits16")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The canopy model's head, narrower, on a tiny ViT in place of ViT-L."""
    from tests.helpers.backbones import tiny_vit

    def load_backbone(name: str, **_: Any) -> torch.nn.Module:
        assert name == "dinov3_vitl16"
        return tiny_vit(embed_dim=16, depth=24)

    make = depth_models.make_depther_from_config

    def make_narrow(backbone: torch.nn.Module, config: Any, **options: Any) -> Any:
        config.head_kwargs |= {"channels": 8, "post_process_channels": [4, 4, 4, 4], "n_hidden_channels": 4}
        config.n_output_channels = 8
        return make(backbone, config, **options)

    monkeypatch.setattr(depthers, "load_backbone", load_backbone)
    monkeypatch.setattr(depth_models, "make_depther_from_config", make_narrow)


@pytest.mark.usefixtures("small")
def test_heads_are_loaded_strictly_from_files_of_both_formats(tmp_path: Path) -> None:
    trained = dinov3_vitl16_chmv2(pretrained=False)
    state = trained.decoder.state_dict()
    images = torch.randn(1, 3, 40, 50)
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"model": state, "optimizer": {}, "iteration": 3}, tmp_path / "training.pth")
    for source in (tmp_path / "bare.pth", (tmp_path / "training.pth").as_uri()):
        torch.testing.assert_close(dinov3_vitl16_chmv2(weights=source)(images), trained(images), rtol=0, atol=0)
    assert 0 < trained(images).min() <= trained(images).max() <= 96.0

    torch.save({key: value for key, value in state.items() if key != "convs.0.conv.weight"}, tmp_path / "partial.pth")
    with pytest.raises(ValueError, match=r"partial\.pth.*nothing was loaded.*convs\.0\.conv\.weight"):
        dinov3_vitl16_chmv2(weights=tmp_path / "partial.pth")


def test_released_addresses_and_wrong_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = depthers._resolve(DepthWeights.SYNTHMIX, DepthWeights.SYNTHMIX, None)
    base = "https://dl.fbaipublicfiles.com/dinov3"
    assert resolved == f"{base}/dinov3_vit7b16/dinov3_vit7b16_synthmix_dpt_head-02040be1.pth"
    assert (
        depthers._resolve("chmv2", DepthWeights.CHMV2, None)
        == f"{base}/chmv2/dinov3_vitl16_chmv2_dpt_head-3703d643.pth"
    )
    assert str(depthers._resolve("chmv2", DepthWeights.CHMV2, "01234567")).endswith("-01234567.pth")
    with pytest.raises(ValueError, match="no weights CHMV2; released are: SYNTHMIX"):
        dinov3_vit7b16_dd(weights=DepthWeights.CHMV2)
    with pytest.raises(TypeError, match="expected CHMV2"):
        dinov3_vitl16_chmv2(weights=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="depht_range"):
        dinov3_vit7b16_dd(depht_range=(1, 2))
