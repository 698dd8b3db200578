"""Pictures of results: colours mean what the legend says, panels keep their shape."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.eval.pictures import (
    ColourBar,
    as_picture,
    colour_labels,
    colour_values,
    draw_boxes,
    overlay,
    palette,
    save_panels,
)


def test_colours_of_a_palette_differ_and_stay() -> None:
    colours = palette(150)
    assert len({tuple(colour) for colour in colours.tolist()}) == 150
    np.testing.assert_array_equal(palette(20), colours[:20])
    first = colours[:20].astype(int)
    distance = np.abs(first[:, None] - first[None]).sum(-1) + 1000 * np.eye(20, dtype=int)
    assert distance.min() > 40


def test_labels_that_are_no_class_have_the_colour_of_ignored_ones() -> None:
    labels = torch.tensor([[[0, 1], [255, 2]]], dtype=torch.uint8)
    drawn = colour_labels(labels, palette(2), ignored=(1, 2, 3))
    assert drawn.tolist() == [[palette(2)[0].tolist(), palette(2)[1].tolist()], [[1, 2, 3], [1, 2, 3]]]


def test_values_beyond_the_scale_have_the_colours_of_its_ends() -> None:
    drawn = colour_values(np.array([[0.0, 1.0, 5.0], [-3.0, np.nan, np.inf]]), 0, 1, invalid=(9, 9, 9))
    assert drawn[0, 1].tolist() == drawn[0, 2].tolist()
    assert drawn[0, 0].tolist() == drawn[1, 0].tolist() != drawn[0, 1].tolist()
    assert drawn[1, 1].tolist() == drawn[1, 2].tolist() == [9, 9, 9]


def test_images_of_every_kind_become_pictures() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    column = torch.tensor([mean, std]).view(2, 3, 1, 1)
    for image in (pixels, Image.fromarray(pixels), tensor, tensor / 255):
        np.testing.assert_array_equal(as_picture(image), pixels)
    np.testing.assert_array_equal(as_picture((tensor / 255 - column[0]) / column[1], mean, std), pixels)
    scaled = [tuple(255 * value for value in values) for values in (mean, std)]
    np.testing.assert_array_equal(as_picture((tensor - 255 * column[0]) / (255 * column[1]), *scaled), pixels)
    assert as_picture(pixels[..., 0]).shape == (4, 5, 3)


def test_overlays_need_one_size() -> None:
    image = np.full((4, 5, 3), 100, dtype=np.uint8)
    assert overlay(image, np.full_like(image, 200), 0.5).tolist() == np.full_like(image, 150).tolist()
    with pytest.raises(ValueError, match="one shape"):
        overlay(image, image[:2])


def test_boxes_are_drawn_around_what_they_hold() -> None:
    image = np.zeros((60, 80, 3), dtype=np.uint8)
    drawn = draw_boxes(image, [(10, 20, 30, 50)], ["cat"], [(255, 0, 0)])
    assert drawn[50, 20].tolist() == drawn[35, 30].tolist() == [255, 0, 0]
    assert not drawn[40, 20].any()
    assert not image.any()


def test_labels_stay_in_the_picture_and_off_what_they_name() -> None:
    image, red = np.zeros((60, 80, 3), dtype=np.uint8), [255, 0, 0]
    above = draw_boxes(image, [(10, 30, 40, 50)], ["cat"], [red])
    assert above[20:30].any()
    assert not above[32:48, 12:38].any()
    no_room = draw_boxes(image, [(60, 0, 79, 50)], ["a long name"], [red])
    assert no_room[2:10, 0:60].any()  # moved to the left, and inside


def test_panels_are_written_with_legend_and_bar(tmp_path: Path) -> None:
    panels = {"image": np.zeros((40, 60, 3), np.uint8), "truth": np.full((40, 60, 3), 255, np.uint8)}
    save_panels(tmp_path / "a/plain.png", panels, height_px=100)
    legend = {f"class {i}": colour for i, colour in enumerate(palette(9).tolist())}
    save_panels(tmp_path / "legend.png", panels, legend=legend, title="a title", height_px=100)
    save_panels(tmp_path / "bar.png", panels, colour_bar=ColourBar(0, 10, "depth [m]"), height_px=100)
    plain, with_legend, with_bar = (
        np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("a/plain.png", "legend.png", "bar.png")
    )
    assert with_legend.shape[0] > plain.shape[0]
    assert with_bar.shape[1] > plain.shape[1]
    for colour in palette(9):
        assert (with_legend == colour).all(-1).any()
