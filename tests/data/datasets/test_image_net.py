import logging
import pickle
from pathlib import Path

import numpy as np
import pytest

from dinov3.data import make_dataset
from dinov3.data.datasets import ImageNet
from tests.helpers.images import class_image

Split = ImageNet.Split


def write_image_net(root: Path, labels: str | None = 'n01,tench\nn02,"goldfish, gold"\n') -> None:
    files = [
        "train/n01/n01_7.JPEG",
        "train/n02/n02_3.JPEG",
        "train/n02/n02_12.JPEG",
        "val/n02/ILSVRC2012_val_00000009.JPEG",
    ]
    for i, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        class_image(0, i).save(root / name, format="JPEG")
    if labels is not None:
        (root / "labels.txt").write_text(labels)


def test_the_index_is_made_once_and_read_by_the_dataset_string(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_image_net(tmp_path)
    extra = tmp_path / "extra" / "folder"
    for split in (Split.TRAIN, Split.VAL):
        ImageNet(split=split, root=tmp_path, extra=extra).dump_extra()
    with caplog.at_level(logging.WARNING, "dinov3"):
        train = make_dataset(dataset_str=f"ImageNet:split=TRAIN:root={tmp_path}:extra={extra}")
        assert len(train) == 3
    assert "3 images in the split TRAIN, the official one has 1281167" in caplog.text
    assert [train[i][1] for i in range(3)] == [0, 1, 1]
    assert train.get_image_relpath(1) == "train/n02/n02_12.JPEG"
    assert (train.get_class_id(2), train.get_class_name(2)) == ("n02", "goldfish, gold")
    assert (train.find_class_id(0), train.find_class_name(0)) == ("n01", "tench")
    # A split may lack a class: indices still count the classes of labels.txt.
    val = ImageNet(split=Split.VAL, root=tmp_path, extra=extra)
    assert (len(val), val[0][1], val.split) == (1, 1, Split.VAL)


def test_without_labels_the_folders_name_the_classes(tmp_path: Path) -> None:
    write_image_net(tmp_path, labels=None)
    dataset = ImageNet(split=Split.TRAIN, root=tmp_path, extra=tmp_path)
    dataset.dump_extra()
    assert dataset.find_class_name(1) == dataset.get_class_name(2) == "n02"


def test_the_test_split_has_no_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ImageNet(split=Split.TEST, root=tmp_path, extra=tmp_path / "extra")
    dataset.dump_extra()
    assert len(dataset) == 100_000
    assert dataset.get_image_relpath(99_999) == "test/ILSVRC2012_test_00100000.JPEG"
    assert (dataset.get_target(0), dataset.get_targets(), dataset.get_class_id(0), dataset.get_class_name(0)) == (
        None,
    ) * 4
    entries = np.load(tmp_path / "extra/entries-TEST.npy")
    assert entries["class_index"][0] == 2**32 - 1
    with pytest.raises(ValueError, match="classes of the split TEST are not public"):
        dataset.find_class_id(0)


def test_a_missing_index_says_how_to_make_it(tmp_path: Path) -> None:
    dataset = ImageNet(split=Split.VAL, root=tmp_path, extra=tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"entries-VAL.npy is missing.*split=ImageNet.Split.VAL.*dump_extra\(\)"
    ):
        len(dataset)


def test_folders_that_are_not_in_the_labels_are_named(tmp_path: Path) -> None:
    write_image_net(tmp_path, labels="n01,tench\n")
    with pytest.raises(ValueError, match=r"labels.txt doesn't list: \['n02'\]"):
        ImageNet(split=Split.TRAIN, root=tmp_path, extra=tmp_path).dump_extra()


@pytest.mark.parametrize("split", list(Split))
def test_paths_and_numbers_are_inverse(split: ImageNet.Split) -> None:
    class_id = None if split is Split.TEST else "n01440764"
    path = split.get_image_relpath(293, class_id)
    assert split.parse_image_relpath(path) == (class_id, 293)
    assert path.startswith(split.get_dirname(class_id))


@pytest.mark.parametrize("path", ["train/n01/n02_7.JPEG", "val/n01/n01_7.JPEG", "train/n01/n01_x.JPEG", "n01_7.JPEG"])
def test_other_paths_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not the path of an image of the split TRAIN"):
        Split.TRAIN.parse_image_relpath(path)


def test_classes_are_needed_for_paths_in_class_folders() -> None:
    with pytest.raises(ValueError, match="a class id is needed"):
        Split.TRAIN.get_image_relpath(7)


def test_a_split_by_its_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"ImageNet.Split.TRAIN, ImageNet.Split.VAL.*got 'train'"):
        ImageNet(split="train", root=tmp_path, extra=tmp_path)  # type: ignore[arg-type]


def test_datasets_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    write_image_net(tmp_path)
    dataset = ImageNet(split=Split.TRAIN, root=tmp_path, extra=tmp_path)
    dataset.dump_extra()
    assert pickle.loads(pickle.dumps(dataset))[0][1] == dataset[0][1]
