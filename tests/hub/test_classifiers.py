"""The released classifier: its tensors, its scores, where its weights come from, what is refused."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dinov3.hub.classifiers as classifiers
from dinov3.hub.backbones import dinov3_vit7b16, dinov3_vits16
from dinov3.hub.classifiers import (
    ClassifierWeights,
    LinearClassifier,
    _make_dinov3_linear_classifier,
    dinov3_vit7b16_lc,
)

_CLASSES = 5


def _tiny_backbone() -> nn.Module:
    torch.manual_seed(0)
    return dinov3_vits16(pretrained=False, depth=2, embed_dim=48, num_heads=3).eval()


def _head(**changes: Any) -> dict[str, Any]:
    return {"weight": torch.randn(_CLASSES, 96), "bias": torch.randn(_CLASSES)} | changes


@pytest.fixture
def tiny_release(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The entry point on a backbone of the size of a test; what that was asked for."""
    asked: dict[str, Any] = {}

    def load(name: str, **options: Any) -> nn.Module:
        asked.update(options, name=name)
        return _tiny_backbone()

    monkeypatch.setattr(classifiers, "load_backbone", load)
    return asked


def test_the_released_classifier_has_these_tensors_and_no_other() -> None:
    with torch.device("meta"):
        model = dinov3_vit7b16_lc(pretrained=False)
        backbone = dinov3_vit7b16(pretrained=False)
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    wanted = {f"backbone.{key}": tuple(value.shape) for key, value in backbone.state_dict().items()}
    assert state == wanted | {"linear_head.weight": (1000, 8192), "linear_head.bias": (1000,)}
    assert not model.training


def test_scores_are_those_of_class_token_and_mean_patch(tiny_release: dict[str, Any], tmp_path: Path) -> None:
    torch.save(head := _head(), tmp_path / "head.pth")
    digits = hashlib.sha256((tmp_path / "head.pth").read_bytes()).hexdigest()[:8]
    file = (tmp_path / "head.pth").rename(tmp_path / f"head-{digits}.pth")
    model = dinov3_vit7b16_lc(weights=file, backbone_weights="7b.pth", check_hash=True, num_classes=_CLASSES)
    assert tiny_release == {
        "name": "dinov3_vit7b16",
        "pretrained": True,
        "weights": "7b.pth",
        "check_hash": True,
    }
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        features = model.backbone.forward_features(images)  # type: ignore[operator]
        x = torch.cat([features["x_norm_clstoken"], features["x_norm_patchtokens"].mean(1)], dim=1)
        torch.testing.assert_close(model(images), x @ head["weight"].T + head["bias"])
    assert not model.training
    assert model.normalization.mean == (0.485, 0.456, 0.406)  # type: ignore[union-attr]
    assert model.make_transform is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.ones(1)}, "scale"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"bias": None}, "bias"),
    ],
)
def test_head_files_must_fit(
    change: dict[str, Any], message: str, tiny_release: dict[str, Any], tmp_path: Path
) -> None:
    state = {key: value for key, value in _head(**change).items() if value is not None}
    torch.save(state, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=rf"linear head on dinov3_vit7b16, weights=.*head\.pth: (.|\n)*{message}"):
        dinov3_vit7b16_lc(weights=tmp_path / "head.pth", num_classes=_CLASSES)


def test_where_the_head_comes_from() -> None:
    base = "https://dl.fbaipublicfiles.com/dinov3/dinov3_vit7b16/dinov3_vit7b16_imagenet1k_linear_head"
    for weights in (ClassifierWeights.IMAGENET1K, "IMAGENET1K", "imagenet1k"):
        assert classifiers._resolve("dinov3_vit7b16", weights, None) == f"{base}-90d8ed92.pth"
    assert classifiers._resolve("dinov3_vit7b16", "IMAGENET1K", "0123abcd") == f"{base}-0123abcd.pth"
    assert classifiers._resolve("dinov3_vit7b16", Path("a/b.pth"), None) == Path("a/b.pth")
    with pytest.raises(TypeError, match="got 3 for weights, expected one of IMAGENET1K"):
        classifiers._resolve("dinov3_vit7b16", 3, None)
    with pytest.raises(ValueError, match="no released linear head on dinov3_vits16"):
        _make_dinov3_linear_classifier(backbone_name="dinov3_vits16")
    with pytest.raises(TypeError, match="surplus"):
        dinov3_vit7b16_lc(pretrained=False, surplus=1)


def test_random_weights_need_no_file(tiny_release: dict[str, Any]) -> None:
    model = dinov3_vit7b16_lc(pretrained=False)
    assert isinstance(model, LinearClassifier)
    assert tiny_release["pretrained"] is False
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
