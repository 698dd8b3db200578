"""The example's depth is exact, its data set is read back as it was made, and its command works."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.data import make_dataset
from dinov3.eval.depth import example


def test_depth_of_an_empty_room_follows_from_its_sizes() -> None:
    room = example.Room(camera=1.5, ceiling=1.0, side=2.0, back=6.0)
    image, depth = example._draw_room(np.random.default_rng(0), room)
    assert image.shape == (96, 128, 3)
    assert depth.max() == 6.0
    row, column = 90, 64  # on the floor, near the middle
    ray = (row + 0.5 - 48) / 110.0
    np.testing.assert_allclose(depth[row, column], 1.5 / ray)
    np.testing.assert_allclose(depth[48, 0], 2.0 / (63.5 / 110.0))  # the left wall
    np.testing.assert_allclose(depth[5, 64], 1.0 / (42.5 / 110.0))  # the ceiling


def test_figures_hide_what_is_behind_them() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        image, depth = example.compose(rng)
        assert image.dtype == np.uint8
        assert depth.dtype == np.float32
        assert 0.5 < depth.min() <= depth.max() <= 9.0


def test_scenes_are_written_once_and_read_back_in_metres(tmp_path: Path) -> None:
    strings = example.make_example(tmp_path / "data", n_train=2, n_test=1)
    again = example.make_example(tmp_path / "data", n_train=2, n_test=1)
    assert strings == again
    dataset = make_dataset(dataset_str=strings["train"])
    assert len(dataset) == 2
    image, depth = dataset[1]
    pixels, exact = example.compose(np.random.default_rng([0, 0, 1]))
    np.testing.assert_array_equal(np.asarray(image), pixels)
    np.testing.assert_allclose(depth.as_subclass(torch.Tensor)[0].numpy(), exact, atol=5.1e-4)


def test_guesses_that_ignore_the_image(tmp_path: Path) -> None:
    for split, metres in (("train", (1.0, 3.0, 4.0)), ("test", (2.0, 6.0))):
        (tmp_path / "depth" / split).mkdir(parents=True)
        for i, depth in enumerate(metres):
            millimetres = np.full((4, 6), 1000 * depth, dtype=np.uint16)
            millimetres[:2] = 2000  # the upper half is the same in all scenes
            Image.fromarray(millimetres).save(tmp_path / "depth" / split / f"{i}.png")
    found = example.guesses(tmp_path)
    assert found["one depth for all pixels"]["abs_rel"] == pytest.approx((0 + 0 + 0 + 2 / 3) / 4)
    place = found["usual depth of each place"]  # 2 above, 3 below
    assert place["abs_rel"] == pytest.approx((0 + 1 / 2 + 0 + 1 / 2) / 4)
    assert place["a1"] == pytest.approx(1 / 2)
    assert place["rmse"] == pytest.approx((np.sqrt(1 / 2) + np.sqrt(9 / 2)) / 2)


def test_the_command(tmp_path: Path) -> None:
    argv = [
        "--output-dir",
        str(tmp_path),
        "--head",
        "linear",
        "--iterations",
        "2",
        "--scenes",
        "8",
        "--test-scenes",
        "2",
    ]
    assert example.main(argv) == 0
    report = (tmp_path / "report.md").read_text()
    for name in ("one depth for all pixels", "usual depth of each place", "linear head on the backbone"):
        assert f"| {name} | 0." in report
    assert (tmp_path / "results-depth.csv").is_file()
    assert len(list((tmp_path / "visualizations").glob("error_*.png"))) == 2
