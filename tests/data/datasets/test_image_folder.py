import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from dinov3.data import make_data_loader, make_dataset
from dinov3.data.datasets import ImageFolder
from tests.helpers.images import broken_images, class_image, odd_images, write_image_folder


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def test_labels_are_the_first_level_folders(tmp_path: Path) -> None:
    write_image_folder(tmp_path, classes=3, per_class=2)
    write_image_folder(tmp_path / "class_1" / "deeper" / "still", classes=0, per_class=1)
    dataset = ImageFolder(root=tmp_path)
    assert len(dataset) == 7
    assert dataset.class_names == ["class_0", "class_1", "class_2"]
    targets = dataset.get_targets()
    assert targets is not None
    assert targets.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert targets.dtype == np.int64
    assert [dataset.get_target(i) for i in range(7)] == targets.tolist()
    assert (dataset.get_class_name(4), dataset.get_image_relpath(4)) == ("class_1", "class_1/deeper/still/000.png")
    image, target = dataset[6]
    assert target == 2
    assert image.tobytes() == class_image(2, 1).tobytes()


def test_without_sub_folders_there_are_no_labels(tmp_path: Path) -> None:
    write_image_folder(tmp_path, classes=0, per_class=3)
    dataset = ImageFolder(root=tmp_path)
    assert len(dataset) == 3
    assert (dataset[0][1], dataset.get_target(0), dataset.get_targets(), dataset.get_class_name(0)) == (None,) * 4
    assert dataset.class_names == []


def test_images_beside_sub_folders_leave_all_without_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_image_folder(tmp_path, classes=2, per_class=1)
    write_image_folder(tmp_path, classes=0, per_class=1)
    with caplog.at_level(logging.WARNING, "dinov3"):
        dataset = ImageFolder(root=tmp_path)
    assert len(dataset) == 3
    assert dataset.get_targets() is None
    assert "1 images lie directly in" in caplog.text


@pytest.mark.parametrize("split", ["train", "TRAIN"])
def test_a_split_is_a_sub_folder(tmp_path: Path, split: str) -> None:
    write_image_folder(tmp_path / "train", classes=2, per_class=1)
    write_image_folder(tmp_path / "val", classes=2, per_class=3)
    dataset = make_dataset(dataset_str=f"ImageFolder:root={tmp_path}:split={split}")
    assert (len(dataset), dataset.class_names) == (2, ["class_0", "class_1"])


def test_splits_taken_for_classes_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_image_folder(tmp_path / "train", classes=1, per_class=1)
    write_image_folder(tmp_path / "val", classes=1, per_class=1)
    with caplog.at_level(logging.WARNING, "dinov3"):
        ImageFolder(root=tmp_path)
    assert "look like splits: choose one with split=" in caplog.text


def test_hidden_and_other_files_do_not_count(tmp_path: Path) -> None:
    write_image_folder(tmp_path, classes=1, per_class=1)
    write_files(tmp_path / "class_0", {"notes.txt": b"", "._000.png": b"", "thumbs.db": b""})
    write_image_folder(tmp_path / ".thumbnails", classes=0, per_class=1)
    (tmp_path / "class_0" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    assert len(ImageFolder(root=tmp_path)) == 1


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "elsewhere", classes=0, per_class=2)
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data", target_is_directory=True)
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    dataset = ImageFolder(root=tmp_path / "data")
    assert (len(dataset), dataset.class_names) == (2, ["b"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"root": "missing"}, FileNotFoundError, "root=.*missing is not a folder"),
        ({"root": "empty"}, ValueError, r"no image below .*empty \(looked for .bmp.*\.webp\)"),
        ({"root": "empty", "split": "val"}, FileNotFoundError, "split=val, but .* its folders: none"),
        ({"root": "full", "split": "vla"}, FileNotFoundError, "its folders: train, val"),
        ({"root": "full", "on_error": "ignore"}, ValueError, "on_error must be 'skip' or 'raise', got 'ignore'"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, options: dict[str, str], error: type[Exception], message: str) -> None:
    (tmp_path / "empty").mkdir()
    for split in ("train", "val"):
        write_image_folder(tmp_path / "full" / split, classes=1, per_class=1)
    with pytest.raises(error, match=message):
        ImageFolder(**(options | {"root": tmp_path / options["root"]}))  # type: ignore[arg-type]


def test_broken_files_are_replaced_by_their_neighbour_and_listed(tmp_path: Path) -> None:
    write_files(tmp_path / "a", broken_images())
    write_image_folder(tmp_path / "b", classes=0, per_class=2)
    dataset = ImageFolder(root=tmp_path)
    n_broken = len(broken_images())
    for _ in range(2):
        image, target = dataset[1]
        assert target == 1  # image and label are of the same sample
        assert image.tobytes() == class_image(0, 0).tobytes()
    assert len(dataset.skipped.path.read_text().splitlines()) == n_broken - 1  # each file is noted once
    dataset[0]
    assert set(dataset.unreadable) == {f"a/{name}" for name in broken_images()}


def test_the_last_image_is_replaced_by_the_first(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "a", classes=0, per_class=1)
    write_files(tmp_path / "b", {"x.jpg": b""})
    assert ImageFolder(root=tmp_path)[1][1] == 0


def test_broken_files_raise_if_asked(tmp_path: Path) -> None:
    write_image_folder(tmp_path, classes=1, per_class=1)
    write_files(tmp_path / "class_0", {"bad.jpg": b"no image"})
    dataset = make_dataset(dataset_str=f"ImageFolder:root={tmp_path}:on_error=raise")
    dataset[0]
    with pytest.raises(RuntimeError, match="can not read .*class_0/bad.jpg"):
        dataset[1]


def test_a_folder_of_broken_files_only_raises(tmp_path: Path) -> None:
    write_files(tmp_path, broken_images())
    with pytest.raises(RuntimeError, match=f"none of {len(broken_images())} images from .* can be decoded"):
        ImageFolder(root=tmp_path)[0]


def test_a_file_that_vanishes_is_replaced(tmp_path: Path) -> None:
    paths = write_image_folder(tmp_path, classes=0, per_class=2)
    dataset = ImageFolder(root=tmp_path)
    paths[0].unlink()
    assert dataset[0][0].tobytes() == class_image(0, 1).tobytes()


def to_tensor(image: Any) -> torch.Tensor:
    return v2.functional.pil_to_tensor(image.resize((8, 8)))


def test_a_mixed_collection_is_loaded_by_workers_to_the_end(tmp_path: Path) -> None:
    write_files(tmp_path / "odd", odd_images())
    write_files(tmp_path / "broken", broken_images())
    write_image_folder(tmp_path / "fine", classes=0, per_class=3)
    dataset = ImageFolder(root=tmp_path, transform=to_tensor)
    loader = make_data_loader(dataset=dataset, batch_size=4, num_workers=2, draw_seed=0)
    batches = [batch for _, batch in zip(range(10), loader, strict=False)]
    again = make_data_loader(dataset=dataset, batch_size=4, num_workers=0, draw_seed=0)
    for (images, targets), (images_0, targets_0) in zip(batches, again, strict=False):
        assert torch.equal(images, images_0)
        assert torch.equal(targets, targets_0)


def test_positions_out_of_range_are_refused(tmp_path: Path) -> None:
    write_image_folder(tmp_path, classes=0, per_class=2)
    dataset = ImageFolder(root=tmp_path)
    with pytest.raises(IndexError, match="index 2 is out of range: the dataset has 2 images"):
        dataset[2]


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_names_that_are_not_utf_8_are_read(tmp_path: Path) -> None:
    write_image_folder(tmp_path, classes=1, per_class=1)
    (tmp_path / "class_0" / "000.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/class_0/caf\xe9.png"))
    assert ImageFolder(root=tmp_path)[0][1] == 0
