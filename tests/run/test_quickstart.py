"""The quick start: its images, its pictures, the whole of it in small; in full with three seeds if slow tests run."""

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.data import photos
from dinov3.run import quickstart, quickstart_data
from dinov3.run.quickstart_evaluation import FinishedRun, initial_backbone
from dinov3.run.quickstart_figures import pca_colours, similarity_map

TINY = (
    "train.batch_size_per_gpu=16",
    "train.OFFICIAL_EPOCH_LENGTH=6",
    "train.num_workers=0",
    "optim.epochs=2",
    "crops.local_crops_number=2",
    "evaluation.eval_period_iterations=6",
)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Any:
    """The quick start sets up the root logger; leave it as it was."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)


# -- Images -----------------------------------------------------------------------------------------------------------


def test_no_pixel_of_a_photograph_is_in_both_splits() -> None:
    columns = np.tile(np.arange(400, dtype=np.uint16) // 2, (320, 1)).astype(np.uint8)  # a pixel tells its column
    photo = Image.fromarray(columns).convert("RGB")
    rng = np.random.default_rng(0)
    pixels = {
        split: np.stack([np.asarray(quickstart_data._crop(photo, split, rng)) for _ in range(200)])
        for split in quickstart_data.SPLITS
    }
    assert pixels["train"].max() < pixels["val"].min()
    assert pixels["train"].min() < 4  # and both parts are used to their ends
    assert pixels["val"].max() > 196


def test_no_handwritten_digit_is_in_both_splits() -> None:
    glyphs = [Image.new("L", (8, 8), color=10 + 2 * i) for i in range(100)]
    rng = np.random.default_rng(0)
    shades = {
        split: {np.asarray(quickstart_data._scatter(glyphs, split, rng)).max() for _ in range(300)}
        for split in quickstart_data.SPLITS
    }
    assert len(shades["train"]) > 40
    assert len(shades["val"]) > 30
    assert not shades["train"] & shades["val"]


def test_image_folder_depends_on_the_seed_alone(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert quickstart_data.write_image_folder(tmp_path / name, n_train=2, n_val=1, seed=seed)["val"] >= 12
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    assert len({path.parent.name for path in files}) >= 12
    content = {name: [(tmp_path / name / path).read_bytes() for path in files] for name in "abc"}
    assert content["a"] == content["b"]
    assert content["a"] != content["c"]


def test_writing_again_replaces_the_images(tmp_path: Path) -> None:
    quickstart_data.write_image_folder(tmp_path, n_train=3, n_val=2)
    counts = quickstart_data.write_image_folder(tmp_path, n_train=1, n_val=1)
    assert counts["train"] == counts["val"] == len(list((tmp_path / "train").rglob("*.png")))


def test_without_scikit_image_digits_join_two_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_sklearn = tuple(photo for photo in photos.PHOTOS if photo.package == "sklearn")
    absent = photos.Photo("absent", "data/x.png", "no_such_package", "", "", "")
    monkeypatch.setattr(photos, "PHOTOS", (*of_sklearn, absent))
    quickstart_data.write_image_folder(tmp_path, n_train=1, n_val=1)
    names = sorted(path.name for path in (tmp_path / "val").iterdir())
    assert names == ["china", *(f"digit {i}" for i in range(10)), "flower"]
    assert [quickstart_data.is_digit(name) for name in names] == [False, *[True] * 10, False]


# -- Output folder ----------------------------------------------------------------------------------------------------


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "holiday.png").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        quickstart.main(["--output-dir", str(tmp_path)])
    assert (tmp_path / "images" / "holiday.png").read_text() == "mine"


def test_an_earlier_quick_start_is_replaced(tmp_path: Path) -> None:
    output_dir = quickstart.prepare_output_dir(tmp_path / "new")
    (output_dir / "training").mkdir()
    (output_dir / "training" / "training_metrics.json").write_text("{}")
    (output_dir / "pca.png").write_text("old")
    (output_dir / "notes.txt").write_text("mine")
    quickstart.prepare_output_dir(output_dir)
    assert sorted(path.name for path in output_dir.iterdir()) == [quickstart.MARKER, "notes.txt"]


# -- Maps -------------------------------------------------------------------------------------------------------------


def test_pca_gives_alike_patches_alike_colours() -> None:
    kinds = torch.randn(3, 16)
    labels = torch.arange(48).reshape(6, 8) % 3
    colours = pca_colours(kinds[labels].permute(2, 0, 1) + 1e-4 * torch.randn(16, 6, 8))
    assert colours.shape == (6, 8, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    means = np.stack([colours[labels == kind].mean(axis=0) for kind in range(3)])
    within = max(colours[labels == kind][:, :2].std(axis=0).max() for kind in range(3))
    between = min(np.abs(means[i] - means[j]).max() for i in range(3) for j in range(i))
    assert between > 0.3 > 10 * within


def test_pca_does_not_depend_on_the_basis_of_the_features() -> None:
    features = torch.randn(16, 5, 7) * torch.linspace(3, 0.1, 16)[:, None, None]
    rotation, _ = torch.linalg.qr(torch.randn(16, 16))
    turned = torch.einsum("de,ehw->dhw", rotation, features)
    np.testing.assert_allclose(pca_colours(turned), pca_colours(features), atol=1e-3)


def test_similarity_is_one_at_the_query_and_ignores_the_length_of_features() -> None:
    features = torch.randn(16, 6, 8)
    similarities = similarity_map(features, x=0.51, y=0.34)  # column 4, row 2
    assert similarities[2, 4] == pytest.approx(1, abs=1e-5)
    assert similarities.min() == 0
    scaled = similarity_map(features * torch.rand(6, 8).add(0.1), x=0.51, y=0.34)
    np.testing.assert_allclose(scaled, similarities, atol=1e-5)


def test_maps_of_constant_features_are_finite() -> None:
    features = torch.ones(8, 4, 4)
    assert np.isfinite(pca_colours(features)).all()
    assert np.isfinite(similarity_map(features, 0.5, 0.5)).all()


# -- The whole --------------------------------------------------------------------------------------------------------


def test_initial_backbone_is_that_of_the_training(tmp_path: Path) -> None:
    """With a momentum of 1 the exported teacher is what the training started from."""
    images, training = tmp_path / "images", tmp_path / "training"
    quickstart_data.write_image_folder(images, n_train=2, n_val=1)
    frozen = [f"schedules.momentum.{key}=1.0" for key in ("start", "peak", "end")]
    short = ["train.OFFICIAL_EPOCH_LENGTH=1", "optim.epochs=1", "train.num_workers=0", "train.batch_size_per_gpu=8"]
    warmup = ["schedules.lr.warmup_epochs=0"]
    quickstart.train(quickstart.training_arguments(images, training, 3, [*frozen, *short, *warmup]))
    run = FinishedRun.load(images, training, seed=3)
    expected, started = run.trained.state_dict(), run.random.state_dict()
    assert expected.keys() == started.keys()
    for name, value in expected.items():
        torch.testing.assert_close(started[name], value, rtol=0, atol=0)
    other = initial_backbone(run.cfg, seed=4).state_dict()
    assert not torch.equal(other["patch_embed.proj.weight"], expected["patch_embed.proj.weight"])


def test_quick_start_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "N_TRAIN", 12)
    monkeypatch.setattr(quickstart, "N_VAL", 6)
    returned = quickstart.main(["--output-dir", str(tmp_path / "out"), "--seed", "1", *TINY])

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report == json.loads(json.dumps(returned))
    assert report["iterations"] == 12
    assert report["images_seen"] == 12 * 16
    assert list(report["knn_course"]) == ["0", "6", "12"]
    assert report["knn_course"]["0"] == report["knn_random"]
    assert report["knn_course"]["12"] == report["knn_trained"]
    for key in (
        "pixels",
        "random",
        "trained",
        "class_token_trained",
        "colour_pixels",
        "colour_random",
        "colour_trained",
    ):
        assert report["chance"] < report[f"knn_{key}"] <= 100
    assert math.isfinite(report["loss_first"])
    assert math.isfinite(report["loss_last"])
    assert 0 < report["seconds_training"] < report["seconds"]

    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert 'href="explore.html"' in page
    assert "Chelsea the cat" in (tmp_path / "out" / "explore.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(quickstart.PICTURES)
    assert "$" not in re.sub(r"base64,[^\"]*", "", page)  # every value was filled in
    assert not re.search(r"(src|href)=\"(?!data:|explore\.html)", page)  # no network, no file but the one beside it
    assert f"{report['knn_trained']:.1f}" in page
    assert "danielbuechele" in page
    for name in quickstart.PICTURES:
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5  # something is drawn


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_beats_its_random_initialisation(seed: int, tmp_path: Path) -> None:
    report = quickstart.main(["--output-dir", str(tmp_path / "out"), "--seed", str(seed)])
    assert report["knn_trained"] >= report["knn_random"] + 10
    assert report["knn_trained"] > report["knn_pixels"]
    for features in ("colour", "class_token"):
        assert report[f"knn_{features}_trained"] > report[f"knn_{features}_random"] + 2
    assert report["loss_last"] < report["loss_first"] - 1
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "training" / "training_metrics.json").read_text().splitlines()
    ]
    assert all(math.isfinite(value) for row in rows for value in row.values())
