"""The shared part of the predict commands: which images, under which names, and what happens to broken ones."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import nn

import dinov3.hub
from dinov3.checkpointer.heads import HeadFile, save_head
from dinov3.eval.prediction import collect_images, predict_images, predict_main
from tests.helpers.images import broken_images, odd_images


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4)).save(folder / name)


def test_results_are_named_after_images(tmp_path: Path) -> None:
    write(tmp_path / "photos", "b.jpg", "a/b.jpg", "a/c.png", "a/c.jpg")
    write(tmp_path / "more", "b.JPG")
    (tmp_path / "photos/notes.txt").write_text("no image")
    found = collect_images([tmp_path / "photos", tmp_path / "more/b.JPG", tmp_path / "photos/b.jpg"])
    assert list(found) == ["a/b", "a/c_jpg", "a/c_png", "b_jpg", "b_JPG"]
    assert found["b_JPG"] == tmp_path / "more/b.JPG"
    write(tmp_path / "third", "b.jpg")
    assert list(collect_images([tmp_path / "photos/b.jpg", tmp_path / "third"])) == ["b_jpg", "b_jpg-2"]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        collect_images([tmp_path / "absent"])
    with pytest.raises(FileNotFoundError, match="no image in"):
        collect_images([tmp_path])


def test_images_come_upright_and_broken_ones_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    odd, broken = odd_images(), broken_images()
    for name, data in (odd | broken).items():
        (folder / name).write_bytes(data)
    sizes: dict[str, Any] = {}

    def predict_one(model: nn.Module, image: Image.Image, path: Path, args: Any) -> None:
        sizes[path.name] = (image.mode, image.size)

    skipped = predict_images(nn.Identity(), collect_images([folder]), tmp_path / "out", predict_one)
    assert {path.name for path in skipped} == set(broken)
    assert len(sizes) == len(odd)
    assert set(sizes.values()) == {("RGB", (40, 30))}
    report = (tmp_path / "out/skipped.txt").read_text()
    assert all(name in report for name in broken)
    predict_images(nn.Identity(), {"x": folder / "exif.jpg"}, tmp_path / "out", predict_one)
    assert not (tmp_path / "out/skipped.txt").exists()


def test_the_command_loads_heads_of_its_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "x.png")
    head = save_head(tmp_path / "run/head.pth", HeadFile("toy", {}, {}, "dinov3_vits16"))
    asked: list[Any] = []
    monkeypatch.setattr(dinov3.hub, "load_head", lambda *args, **kwargs: asked.append((args, kwargs)) or nn.Identity())

    def predict_one(model: nn.Module, image: Image.Image, path: Path, args: Namespace) -> None:
        path.with_suffix(".txt").write_text(f"{image.size} {args.scale}")

    def call(task: str, images: Path) -> int:
        argv = [f"--head={head.parent}", f"--images={images}", f"--output-dir={tmp_path / 'out'}", "--device=cpu"]
        return predict_main(
            [*argv, "--backbone-weights=w.pth", "--scale=3"],
            task=task,
            description="Writes sizes.",
            predict_one=predict_one,
            add_arguments=lambda parser: parser.add_argument("--scale", type=int) and None,
        )

    assert call("toy", tmp_path / "x.png") == 0
    assert (tmp_path / "out/x.txt").read_text() == "(5, 4) 3"
    assert asked == [((str(head.parent),), {"backbone_weights": "w.pth", "device": "cpu"})]
    (tmp_path / "x.png").write_bytes(b"")
    assert call("toy", tmp_path / "x.png") == 1
    with pytest.raises(ValueError, match=r"a head for toy: use python -m dinov3\.eval\.toy\.predict"):
        call("depth", tmp_path / "x.png")


def test_help_shows_how_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        predict_main(["--help"], task="depth", description="Depth maps.", predict_one=lambda *_: None)
    text = capsys.readouterr().out
    assert "python -m dinov3.eval.depth.predict --head runs/depth --images photo.jpg" in text
    assert "Depth maps." in text
