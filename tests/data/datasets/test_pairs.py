"""Folders of images with folders of annotations: which file belongs to which."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3.data.datasets.pairs import PairFolder


def write_pair(root: Path, name: str, *, annotation: str | None = None, size: tuple[int, int] = (6, 4)) -> None:
    """An image `images/<name>.jpg`, and `annotations/<annotation or name>.png` with the values 0 to 23."""
    for folder, stem, suffix in (("images", name, ".jpg"), ("annotations", annotation or name, ".png")):
        path = root / folder / f"{stem}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size[::-1])
        Image.fromarray(values).convert("RGB" if folder == "images" else "L").save(path)


def test_pairs_have_equal_paths_below_the_two_folders(tmp_path: Path) -> None:
    for name in ("b", "a/b", "a/a"):
        write_pair(tmp_path, name)
    dataset = PairFolder(root=tmp_path)
    assert dataset.image_paths == ["images/a/a.jpg", "images/a/b.jpg", "images/b.jpg"]
    assert dataset.target_paths == ["annotations/a/a.png", "annotations/a/b.png", "annotations/b.png"]
    image, target = dataset[2]
    assert (image.mode, image.size, target.mode) == ("RGB", (6, 4), "L")
    assert np.asarray(target)[3, 5] == 23


@pytest.mark.parametrize("split_first", [False, True])
def test_splits_come_before_or_after_the_kind(tmp_path: Path, split_first: bool) -> None:
    for split in ("train", "val"):
        if split_first:
            write_pair(tmp_path / split, "x")
        else:
            write_pair(tmp_path, f"{split}/x")
    assert len(PairFolder(root=tmp_path, split="val")) == 1
    with pytest.raises(FileNotFoundError, match="no folder .*test.*images= and annotations="):
        PairFolder(root=tmp_path, split="test")


def test_annotations_may_have_an_ending(tmp_path: Path) -> None:
    write_pair(tmp_path, "x", annotation="x_mask")
    assert PairFolder(root=tmp_path, ending="_mask").target_paths == ["annotations/x_mask.png"]
    with pytest.raises(ValueError, match="expected x with one of .*found x_mask.*ending="):
        PairFolder(root=tmp_path)


def test_lonely_images_are_refused_or_left_out(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_pair(tmp_path, name)
    (tmp_path / "annotations/x.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images have no annotation .*x\.jpg.*unmatched=skip"):
        PairFolder(root=tmp_path)
    assert PairFolder(root=tmp_path, unmatched="skip").image_paths == ["images/y.jpg"]


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, "x")
    Image.new("RGB", (6, 4)).save(tmp_path / "images/x.png")
    with pytest.raises(ValueError, match=r"x\.jpg and x\.png .* have the same name"):
        PairFolder(root=tmp_path)


def test_errors_of_a_pair_name_its_files(tmp_path: Path) -> None:
    write_pair(tmp_path, "x")
    Image.new("L", (4, 6)).save(tmp_path / "annotations/x.png")
    with pytest.raises(ValueError, match="image has 6 x 4 pixels, its annotation 4 x 6") as caught:
        PairFolder(root=tmp_path)[0]
    assert "images/x.jpg with annotations/x.png" in "".join(caught.value.__notes__)
    (tmp_path / "images/x.jpg").write_bytes(b"no image")
    with pytest.raises(RuntimeError, match="can not read image") as unreadable:
        PairFolder(root=tmp_path)[0]
    assert "images/x.jpg" in "".join(unreadable.value.__notes__)


def test_images_are_turned_upright(tmp_path: Path) -> None:
    write_pair(tmp_path, "x")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (4, 6)).save(tmp_path / "images/x.jpg", exif=turned)
    assert PairFolder(root=tmp_path)[0][0].size == (6, 4)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        PairFolder(root=tmp_path / "absent")
    with pytest.raises(ValueError, match="needs root"):
        PairFolder()
    with pytest.raises(ValueError, match="'raise' or 'skip', got 'drop'"):
        PairFolder(root=tmp_path, unmatched="drop")
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    with pytest.raises(ValueError, match="no image below"):
        PairFolder(root=tmp_path)
