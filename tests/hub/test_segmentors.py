"""The released segmentation model: its tensors, what head files may hold, what is refused."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hubconf
from dinov3.eval.segmentation.inference import make_inference
from dinov3.eval.segmentation.models import head_state
from dinov3.hub import segmentors
from dinov3.hub.segmentors import SegmentorWeights, _make_dinov3_m2f_segmentor, dinov3_vit7b16_ms
from dinov3.models.vision_transformer import DinoVisionTransformer
from tests.golden.cases import golden_dir
from tests.golden.fill import fill

MANIFEST = golden_dir() / "segmentation_state_dicts.json"


def _described(state: dict[str, Tensor]) -> dict[str, list[Any]]:
    return {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in state.items()}


def test_the_released_model_has_the_tensors_of_the_manifest_and_no_other() -> None:
    manifest = json.loads(MANIFEST.read_text())["dinov3_vit7b16_ms"]
    with torch.device("meta"):
        model = hubconf.dinov3_vit7b16_ms(pretrained=False)
    state = _described(model.state_dict())
    assert {name: value for name, value in state.items() if "backbone" not in name} == manifest["head"]
    assert {name: value for name, value in state.items() if "backbone" in name} == manifest["backbone"]
    assert _described(head_state(model)) == manifest["head"]
    assert len(manifest["head"]) == 479
    assert 926e6 < sum(value.numel() for value in head_state(model).values()) < 928e6
    assert model.segmentation_model[0].interaction_indexes == [9, 19, 29, 39]
    assert not any(p.requires_grad for p in model.segmentation_model[0].backbone.parameters())
    assert not any(module.training for module in model.modules())


def test_the_recipe_on_the_other_backbone() -> None:
    described = json.loads(MANIFEST.read_text())["m2f head on dinov3_vitl16"]["head"]
    (width,) = described["segmentation_model.1.predictor.post_norm.weight"][0]
    with torch.device("meta"):
        model = _make_dinov3_m2f_segmentor(backbone_name="dinov3_vitl16", pretrained=False, hidden_dim=width)
    assert _described(head_state(model)) == described
    assert model.segmentation_model[0].interaction_indexes == [4, 11, 17, 23]


def test_where_the_head_comes_from() -> None:
    base = "https://dl.fbaipublicfiles.com/dinov3/dinov3_vit7b16/dinov3_vit7b16_ade20k_m2f_head"
    for weights in (SegmentorWeights.ADE20K, "ADE20K", "ade20k"):
        assert segmentors._resolve("dinov3_vit7b16", weights, None) == f"{base}-bf307cb1.pth"
    assert segmentors._resolve("dinov3_vit7b16", SegmentorWeights.ADE20K, "0123abcd") == f"{base}-0123abcd.pth"
    assert segmentors._resolve("dinov3_vit7b16", Path("a/b.pth"), None) == Path("a/b.pth")
    with pytest.raises(TypeError, match="got 3 for weights, expected one of ADE20K"):
        segmentors._resolve("dinov3_vit7b16", 3, None)
    with pytest.raises(ValueError, match="no released segmentation head on dinov3_vitl16"):
        _make_dinov3_m2f_segmentor(backbone_name="dinov3_vitl16")
    with pytest.raises(ValueError, match="no segmentation model on 'dinov3_vits16'; there are recipes for"):
        _make_dinov3_m2f_segmentor(backbone_name="dinov3_vits16", pretrained=False)
    with pytest.raises(TypeError, match="hiden_dim"):
        dinov3_vit7b16_ms(pretrained=False, hiden_dim=32)


def _tiny_backbone(*args: Any, **kwargs: Any) -> DinoVisionTransformer:
    return DinoVisionTransformer(img_size=64, embed_dim=32, depth=4, num_heads=2, ffn_ratio=2)


@pytest.fixture
def make_tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The entry point on a backbone, and with a head, of the size of a test."""
    monkeypatch.setattr(segmentors, "load_backbone", _tiny_backbone)
    return partial(dinov3_vit7b16_ms, hidden_dim=32, num_classes=4)


@pytest.fixture(scope="module")
def head() -> dict[str, Tensor]:
    """The head of such a model, filled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentors, "load_backbone", _tiny_backbone)
        return head_state(fill(dinov3_vit7b16_ms(pretrained=False, hidden_dim=32, num_classes=4)))


def test_heads_of_both_formats_load_and_segment(make_tiny: Any, head: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(head, tmp_path / "released.pth")
    torch.save({"model": head, "optimizer": {}}, tmp_path / "trained.pth")
    for name in ("released.pth", "trained.pth"):
        model = make_tiny(weights=tmp_path / name)
        assert all(torch.equal(value, head[key]) for key, value in head_state(model).items())
    image = model.make_transform(40)(torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8))[None]
    assert image.shape == (1, 3, 40, 60)
    scores = make_inference(image, model, "slide", "m2f", (30, 45), 4, crop_size=(32, 48), stride=(24, 32))
    assert scores.shape == (1, 4, 30, 45)
    assert scores.isfinite().all()


def test_every_tensor_of_the_head_must_be_there_and_none_may_be_unknown(
    make_tiny: Any, head: dict[str, Tensor], tmp_path: Path
) -> None:
    path, name = tmp_path / "head.pth", "segmentation_model.1.predictor.class_embed.weight"
    torch.save({key: value for key, value in head.items() if key != name}, path)
    with pytest.raises(ValueError, match=rf"weights=.*head\.pth: .*1 missing: {name}"):
        make_tiny(weights=path)
    torch.save(head | {"segmentation_model.1.extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"1 unexpected: segmentation_model\.1\.extra"):
        make_tiny(weights=path)
    torch.save(head, path)
    with pytest.raises(ValueError, match="of another shape"):
        dinov3_vit7b16_ms(weights=path, hidden_dim=32, num_classes=5)
