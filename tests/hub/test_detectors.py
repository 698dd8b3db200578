"""The released detector: its tensors, what head files may hold, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dinov3.hub.detectors as detectors
from dinov3.eval.detection.config import DetectionHeadConfig
from dinov3.eval.detection.models.processor import head_state, load_head_state
from dinov3.hub.detectors import (
    DetectionWeights,
    DetectorWithProcessor,
    _make_dinov3_detector,
    dinov3_vit7b16_de,
    make_transform,
)
from tests.eval.detection.tiny import tiny_backbone, tiny_config, tiny_detector
from tests.golden.cases import golden_dir
from tests.golden.fill import fill

MANIFEST = golden_dir() / "detection_state_dicts.json"


def _described(state: dict[str, Tensor]) -> dict[str, list[Any]]:
    return {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in state.items()}


def test_the_released_detector_has_the_tensors_of_the_manifest_and_no_other() -> None:
    manifest = json.loads(MANIFEST.read_text())["dinov3_vit7b16_de"]
    with torch.device("meta"):
        model = dinov3_vit7b16_de(pretrained=False)
    state = _described(model.state_dict())
    head = {manifest["full_model_prefix"] + key: value for key, value in manifest["head_checkpoint"].items()}
    backbone = manifest["full_model_prefix"] + manifest["backbone_prefix"]
    assert {key: value for key, value in state.items() if not key.startswith(backbone)} == head
    assert {key.removeprefix(backbone) for key in state if key.startswith(backbone)} == set(
        manifest["backbone_checkpoint"]
    )
    detector = model.detector
    trained = {name: p for name, p in detector.named_parameters() if not name.startswith(manifest["backbone_prefix"])}
    assert sum(p.numel() for p in trained.values()) == manifest["head_parameters"]
    assert detector.backbone.num_channels == manifest["num_channels"]
    assert detector.backbone.extractor.layers_to_use == manifest["layers_to_use"]
    assert not any(p.requires_grad for p in detector.backbone.parameters())
    assert not model.training
    assert detector.num_queries == detector.transformer.two_stage_num_proposals == 1500
    assert detector.query_embed.weight.shape == (3000, 768)
    assert (model.postprocessor.topk, model.postprocessor.reparam) == (1500, True)
    assert detector.transformer.strides == [8, 16, 32, 64]
    names = model.class_names
    assert len(names) == 91
    assert sum(map(bool, names)) == 80
    assert [names[i] for i in (1, 11, 18, 44, 62, 65, 67, 82, 90)] == (
        ["person", "fire hydrant", "dog", "bottle", "chair", "bed", "dining table", "refrigerator", "toothbrush"]
    )


def test_the_recipe_on_the_other_backbone() -> None:
    manifest = json.loads(MANIFEST.read_text())
    (different,) = (value for key, value in manifest.items() if "vitl16plus" in key)
    with torch.device("meta"):
        model = _make_dinov3_detector(backbone_name="dinov3_vitl16plus", pretrained=False)
    state = _described(head_state(model.detector))
    assert state == manifest["dinov3_vit7b16_de"]["head_checkpoint"] | different["head_checkpoint"]
    assert model.detector.backbone.extractor.layers_to_use == different["layers_to_use"]


def test_where_the_head_comes_from() -> None:
    base = "https://dl.fbaipublicfiles.com/dinov3/dinov3_vit7b16/dinov3_vit7b16_coco2017_detr_head"
    for weights in (DetectionWeights.COCO2017, "COCO2017", "coco2017"):
        assert detectors._resolve("dinov3_vit7b16", weights, None) == f"{base}-b0235ff7.pth"
    assert detectors._resolve("dinov3_vit7b16", DetectionWeights.COCO2017, "0123abcd") == f"{base}-0123abcd.pth"
    assert detectors._resolve("dinov3_vit7b16", Path("a/b.pth"), None) == Path("a/b.pth")
    with pytest.raises(TypeError, match="got 3 for weights, expected one of COCO2017"):
        detectors._resolve("dinov3_vit7b16", 3, None)
    with pytest.raises(ValueError, match="no released detector on dinov3_vitl16plus"):
        _make_dinov3_detector(backbone_name="dinov3_vitl16plus")
    with pytest.raises(ValueError, match="no detector for 'dinov3_vits16'; there are recipes for dinov3_vit7b16"):
        _make_dinov3_detector(backbone_name="dinov3_vits16", pretrained=False)


@pytest.fixture
def tiny_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point on a backbone and with a head of the size of a test."""

    def config(_: str) -> DetectionHeadConfig:
        return tiny_config(n_windows_sqrt=2)

    monkeypatch.setattr(detectors, "_head_config", config)
    monkeypatch.setattr(detectors, "load_backbone", lambda *args, **kwargs: tiny_backbone())


def _head_file(path: Path, *, aliases: bool = False, backbone: bool = False, **changes: Tensor) -> Path:
    detector = fill(tiny_detector(n_windows_sqrt=2))
    state = detector.state_dict() if backbone else head_state(detector)
    if aliases:
        state |= {f"transformer.decoder.{k}": v for k, v in state.items() if k.startswith(("class_emb", "bbox_emb"))}
    torch.save({"model": state | changes}, path)
    return path


@pytest.mark.usefixtures("tiny_release")
@pytest.mark.parametrize("aliases", [False, True])
@pytest.mark.parametrize("backbone", [False, True])
def test_a_head_file_may_repeat_names_and_hold_the_backbone(tmp_path: Path, aliases: bool, backbone: bool) -> None:
    model = dinov3_vit7b16_de(weights=_head_file(tmp_path / "head.pth", aliases=aliases, backbone=backbone))
    want = head_state(fill(tiny_detector(n_windows_sqrt=2)))
    got = head_state(model.detector)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], value) for key, value in want.items())


@pytest.mark.usefixtures("tiny_release")
def test_second_names_alone_are_enough(tmp_path: Path) -> None:
    state = torch.load(_head_file(tmp_path / "head.pth"), weights_only=True)["model"]
    renamed = {k.replace("class_embed", "transformer.decoder.class_embed"): v for k, v in state.items()}
    torch.save({"model": renamed}, tmp_path / "head.pth")
    model = dinov3_vit7b16_de(weights=tmp_path / "head.pth")
    assert torch.equal(model.detector.class_embed[0].weight, state["class_embed.0.weight"])


@pytest.mark.usefixtures("tiny_release")
def test_a_head_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "head.pth"
    state = torch.load(_head_file(path), weights_only=True)["model"]
    torch.save({"model": {k: v for k, v in state.items() if k != "transformer.enc_output.bias"}}, path)
    with pytest.raises(ValueError, match=r"head\.pth.*1 missing: .*transformer\.enc_output\.bias"):
        dinov3_vit7b16_de(weights=path)
    torch.save({"model": state | {"transformer.surplus": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"1 unexpected: transformer\.surplus"):
        dinov3_vit7b16_de(weights=path)
    torch.save({"model": state | {"transformer.decoder.class_embed.0.bias": torch.ones(5)}}, path)
    with pytest.raises(ValueError, match=r"class_embed\.0\.bias twice.*different values"):
        dinov3_vit7b16_de(weights=path)


def test_a_released_file_loads_into_a_detector_with_more_queries_than_it_uses() -> None:
    trained = fill(tiny_detector())
    fresh = tiny_detector()
    load_head_state(fresh, head_state(trained))
    assert fresh.query_embed is not None
    assert torch.equal(fresh.query_embed.weight, trained.query_embed.weight)  # type: ignore[union-attr]


def test_threshold_and_original_sizes() -> None:
    detector = fill(tiny_detector()).eval()
    from dinov3.eval.detection.models.detr import PostProcess

    model = DetectorWithProcessor(detector, PostProcess(topk=10, reparam=True)).eval()
    images = [torch.randn(3, 64, 96), torch.randn(3, 48, 64)]
    plain = model(images)
    assert [one["boxes"].shape for one in plain] == [(10, 4)] * 2
    middle = float(plain[0]["scores"][4])
    (fewer, _) = model(images, score_threshold=middle)
    assert torch.equal(fewer["boxes"], plain[0]["boxes"][:5])
    doubled = model(images, original_sizes=[(128, 288), (48, 64)])
    torch.testing.assert_close(doubled[0]["boxes"], plain[0]["boxes"] * torch.tensor([3.0, 2.0, 3.0, 2.0]))
    torch.testing.assert_close(doubled[1]["boxes"], plain[1]["boxes"])
    with pytest.raises(ValueError, match="1 original sizes for 2 images"):
        model(images, original_sizes=[(1, 1)])
    with pytest.raises(ValueError, match="at least one image"):
        model([])


def test_make_transform() -> None:
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    from dinov3.eval.detection.models.detr import PostProcess

    model = DetectorWithProcessor(tiny_detector(), PostProcess(topk=10, reparam=True))
    assert torch.equal(model.make_transform(100)(image), make_transform(100)(image))
    assert model.make_transform(100, 120)(image).shape == (3, 96, 128)
    made = make_transform(100)(image)
    assert made.shape == (3, 112, 144)  # 100 x 140, up to multiples of 16
    assert type(made) is Tensor
    assert made.dtype == torch.float32
    white = make_transform(32)(torch.full((3, 32, 32), 255, dtype=torch.uint8))
    torch.testing.assert_close(
        white[:, 0, 0], (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    )
