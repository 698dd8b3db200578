"""Index masks of every kind, by dataset string and by class."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3.data import make_dataset
from dinov3.data.datasets import SegmentationFolder
from dinov3.data.datasets.segmentation_folder import MaskDecoder

INDICES = np.array([[0, 1, 2], [3, 254, 255]], dtype=np.uint16)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def palette_mask() -> Image.Image:
    image = Image.fromarray(INDICES.astype(np.uint8), mode=None).convert("P")
    image.putdata(INDICES.flatten().tolist())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    return image


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(INDICES.astype(np.uint8))),
        encoded(palette_mask()),
        encoded(Image.fromarray(INDICES)),
        encoded(Image.fromarray(INDICES), "TIFF"),
    ],
    ids=["grey", "palette", "16 bits", "16 bits tiff"],
)
def test_masks_hold_indices_however_they_are_stored(data: bytes) -> None:
    mask = MaskDecoder(data).decode()
    assert mask.mode == "L"
    np.testing.assert_array_equal(np.asarray(mask), INDICES)


def test_bilevel_masks_have_two_classes() -> None:
    data = encoded(Image.fromarray(np.array([[True, False]])))
    assert np.asarray(MaskDecoder(data).decode()).tolist() == [[1, 0]]


def test_ignored_values_become_255() -> None:
    wide = np.array([[0, 7, 65535], [1, 254, 65535]], dtype=np.uint16)
    mask = MaskDecoder(encoded(Image.fromarray(wide)), ignore_index=65535).decode()
    assert (mask.mode, np.asarray(mask).tolist()) == ("L", [[0, 7, 255], [1, 254, 255]])
    as_they_are = MaskDecoder(encoded(Image.fromarray(wide))).decode()
    assert (as_they_are.mode, np.asarray(as_they_are).tolist()) == ("I", wide.tolist())
    with pytest.raises(ValueError, match="holds the value 255, which means ignored, beside ignore_index=0"):
        MaskDecoder(encoded(Image.fromarray(INDICES)), ignore_index=0).decode()


def test_colours_are_no_indices() -> None:
    with pytest.raises(ValueError, match="mode RGB, expected one channel"):
        MaskDecoder(encoded(Image.new("RGB", (2, 2)))).decode()


def test_a_dataset_string_names_the_folder(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for folder in ("images", "masks"):
            (tmp_path / folder / split).mkdir(parents=True)
        Image.new("RGB", (3, 2)).save(tmp_path / "images" / split / "x.jpg")
        Image.fromarray(INDICES).save(tmp_path / "masks" / split / "x.png")
    (tmp_path / "classes.txt").write_text("sky\nsea \n\n")
    dataset = make_dataset(dataset_str=f"SegmentationFolder:split=val:ignore_index=254:root={tmp_path}")
    assert isinstance(dataset, SegmentationFolder)
    assert dataset.class_names == ["sky", "sea"]
    with pytest.raises(ValueError, match="ignore_index=254") as caught:
        dataset[0]
    assert "masks/val/x.png" in "".join(caught.value.__notes__)
    image, mask = SegmentationFolder(root=tmp_path, split="val")[0]
    assert (image.size, np.asarray(mask).max()) == ((3, 2), 255)
    assert SegmentationFolder(root=tmp_path / ".", split="train").class_names == ["sky", "sea"]
