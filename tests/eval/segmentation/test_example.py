"""The embedded example: exact labels, no pixel in both splits, a report of three rivals."""

from pathlib import Path

import numpy as np
import pytest

from dinov3.data import make_dataset
from dinov3.eval.segmentation import predict
from dinov3.eval.segmentation.example import RawPatches, draw_scene, main, make_example


def test_labels_are_exact_and_splits_are_apart() -> None:
    columns = np.tile(np.arange(400) // 2, (320, 1)).astype(np.uint8)  # a pixel tells its column, and its source
    sources = [np.stack([columns, np.full_like(columns, 40 * i), np.zeros_like(columns)], -1) for i in range(4)]
    seen = {}
    for split in ("train", "val"):
        pairs = [draw_scene(sources, split, np.random.default_rng(i)) for i in range(20)]
        seen[split] = np.concatenate([labels.flatten() for _, labels in pairs])
        for image, labels in pairs:
            assert image.shape == (128, 128, 3)
            assert 2 <= len(np.unique(labels)) <= 4
            for label in np.unique(labels):
                of_class = image[..., 1][labels == label]
                assert of_class.max() - of_class.min() <= 1  # one source in one light
                assert (of_class > 0).all() == (label > 0)
        assert set(seen[split]) == {0, 1, 2, 3}


def test_scenes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        strings = make_example(tmp_path / name, n_train=2, n_val=1, seed=seed)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    assert len(files) == 6
    content = {name: [(tmp_path / name / path).read_bytes() for path in files] for name in "abc"}
    assert content["a"] == content["b"]
    assert content["a"] != content["c"]
    dataset = make_dataset(dataset_str=f"{strings['train']}:root={tmp_path / 'a'}")
    assert len(dataset) == 2
    assert len(dataset.class_names) >= 2
    before = (tmp_path / "a/images/train/0000.png").stat().st_mtime_ns
    make_example(tmp_path / "a", n_train=3, n_val=1)
    assert (tmp_path / "a/images/train/0000.png").stat().st_mtime_ns == before


def test_raw_patches_are_pixels() -> None:
    import torch

    images = torch.rand(2, 3, 16, 24)
    ((patches, mean, extra),) = RawPatches(8).get_intermediate_layers(images)
    assert patches.shape == (2, 192, 2, 3)
    torch.testing.assert_close(patches[0, :64, 1, 2], images[0, 0, 8:, 16:].flatten())
    torch.testing.assert_close(mean[0], patches[0].mean((1, 2)))
    assert extra.shape == (2, 0, 192)


def test_the_whole_example_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--output-dir", str(tmp_path / "out"), "--train-images=4", "--val-images=2", "--iterations=2"]
    assert main([*argv, "eval.n_pictures=1"]) == 0
    report = (tmp_path / "out/report.md").read_text()
    for rival in ("commonest class", "linear head on raw pixels", "linear head on the backbone"):
        assert f"| {rival} | " in report
    assert (tmp_path / "out/head/head.pth").is_file()
    assert (tmp_path / "out/head/pictures/0000.png").is_file()
    picture = tmp_path / "out/data/images/val/0000.png"
    argv = ["--head", f"{tmp_path}/out/head", "--images", str(picture), "--output-dir", str(tmp_path / "predicted")]
    assert predict.main([*argv, "--backbone-weights", f"{tmp_path}/out/backbone.pth"]) == 0
    assert (tmp_path / "predicted/0000_overlay.png").is_file()
