"""From a trained head to files: the predict command, without a YAML."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dinov3.hub
from dinov3.eval.segmentation.models import head_state
from dinov3.eval.segmentation.predict import main, predict_classes
from dinov3.eval.segmentation.weights import make_decoder, save_segmentation_head
from tests.eval.segmentation.toys import (
    M2F,
    configuration,
    register_tiny_backbone,
    scene,
    small_arguments,
    tiny_backbone,
)


def write_head(
    folder: Path, *more: str, names: tuple[str, ...] = ("sky", "sea", "st. john", "sand")
) -> torch.nn.Module:
    config = configuration(*more, *small_arguments(folder, folder), "model.dino_hub=dinov3_tiny")
    decoder = make_decoder(tiny_backbone(), config).eval()
    save_segmentation_head(folder, head_state(decoder), config, list(names))
    return decoder


@pytest.mark.parametrize("more", [("decoder_head.type=linear",), M2F], ids=["linear", "m2f"])
def test_the_command_writes_what_the_model_predicts(
    more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = register_tiny_backbone(monkeypatch, tmp_path, "dinov3_tiny")
    write_head(tmp_path / "run", *more)
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    image, _ = scene(0, (50, 70))
    image.save(images / "deep" / "a.b.png")
    argv = [f"--head={tmp_path / 'run'}", f"--images={images}", f"--output-dir={tmp_path / 'out'}"]
    assert main([*argv, f"--backbone-weights={weights}", "--device=cpu"]) == 0
    written = Image.open(tmp_path / "out/deep/a.b.png")
    assert (written.mode, written.size) == ("P", (70, 50))
    model = dinov3.hub.load_head(tmp_path / "run", backbone=tiny_backbone())
    np.testing.assert_array_equal(np.asarray(written), predict_classes(model, image))
    picture = np.asarray(Image.open(tmp_path / "out/deep/a.b_overlay.png"))
    assert picture.shape[1] > 2 * picture.shape[0]


def test_a_loaded_head_is_the_one_saved(tmp_path: Path) -> None:
    decoder = write_head(tmp_path, "decoder_head.type=linear", "decoder_head.use_cls_token=true")
    model = dinov3.hub.load_head(tmp_path, backbone=tiny_backbone())
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model.predict(x, (40, 50)), decoder.predict(x, (40, 50)), rtol=0, atol=0)  # type: ignore[operator]
    with pytest.raises(ValueError, match="do not fit FeatureDecoder"):
        dinov3.hub.load_head(tmp_path, backbone=_wider())


def _wider() -> torch.nn.Module:
    from dinov3.models.vision_transformer import DinoVisionTransformer
    from tests.eval.segmentation.toys import TINY_VIT

    model = DinoVisionTransformer(**(TINY_VIT | {"embed_dim": 64}))
    model.init_weights()
    return model


def test_many_classes_need_sixteen_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from argparse import Namespace

    from dinov3.eval.segmentation import predict

    names = tuple(f"class {i}" for i in range(300))
    write_head(tmp_path, "decoder_head.type=linear", names=names)
    model = dinov3.hub.load_head(tmp_path, backbone=tiny_backbone())
    monkeypatch.setattr(predict, "predict_classes", lambda *_, **__: np.full((4, 6), 299))
    predict.predict_one(model, Image.new("RGB", (6, 4)), tmp_path / "x", Namespace(img_size=None, no_pictures=True))
    assert (np.asarray(Image.open(tmp_path / "x.png")) == 299).all()
    assert not (tmp_path / "x_overlay.png").exists()
