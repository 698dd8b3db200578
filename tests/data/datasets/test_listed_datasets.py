"""ADE20K, NYU and COCO captions: what the golden cases don't show."""

import json
import operator
import random
from pathlib import Path

import pytest

from dinov3.data import make_dataset
from dinov3.data.datasets import ADE20K, NYU, CocoCaptions
from tests.helpers.images import class_image


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    class_image(0, 0).save(path, format="PNG")


def write_coco(root: Path, year: int, name: str) -> None:
    folder = root / f"annotations_trainval{year}/annotations"
    folder.mkdir(parents=True)
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (5, 1, 9)]
    captions = [{"image_id": 9, "caption": "nine"}, {"image_id": 5, "caption": "five"}, {"image_id": 5, "caption": "V"}]
    (folder / f"captions_{name}.json").write_text(json.dumps({"images": images, "annotations": captions}))
    for image in images:
        save(root / name / name / image["file_name"])


@pytest.mark.parametrize(("split", "year", "name"), [("TRAIN", 2014, "train2014"), ("VAL", 2017, "val2017")])
def test_images_without_captions_are_left_out(tmp_path: Path, split: str, year: int, name: str) -> None:
    write_coco(tmp_path, year, name)
    dataset = make_dataset(dataset_str=f"CocoCaptions:split={split}:root={tmp_path}")
    assert len(dataset) == 2
    assert dataset.get_captions(0) == ["five", "V"]
    assert dataset[1][1] == "nine"
    assert dataset.get_image_relpath(1) == f"{tmp_path}/{name}/{name}/9.jpg"


def test_captions_are_drawn_anew_or_as_asked(tmp_path: Path) -> None:
    write_coco(tmp_path, 2014, "train2014")
    split = CocoCaptions.Split.TRAIN
    assert {CocoCaptions(split, tmp_path).get_target(0) for _ in range(40)} == {"five", "V"}
    first = CocoCaptions(split, tmp_path, choose=operator.itemgetter(0))
    assert {first.get_target(0) for _ in range(10)} == {"five"}
    drawn = [
        [dataset.get_target(0) for _ in range(20)]
        for dataset in (CocoCaptions(split, tmp_path, choose=random.Random(3).choice) for _ in range(2))
    ]
    assert drawn[0] == drawn[1]


def test_validation_and_test_of_nyu_share_their_list(tmp_path: Path) -> None:
    (tmp_path / "nyu_test.txt").write_text("/b/1.jpg /b/1.png 500\n/a/2.jpg /a/2.png 500\n\n")
    for name in ("a/2.jpg", "a/2.png", "b/1.jpg", "b/1.png"):
        save(tmp_path / name)
    for split in (NYU.Split.VAL, NYU.Split.TEST):
        dataset = NYU(split, tmp_path)
        assert dataset.image_paths == ["a/2.jpg", "b/1.jpg"]
        assert dataset[0][0].size == dataset[0][1].size


def test_a_malformed_line_is_shown(tmp_path: Path) -> None:
    (tmp_path / "nyu_train.txt").write_text("only.jpg two.png\n")
    with pytest.raises(ValueError, match=r"nyu_train.txt must hold lines of three fields.*'only.jpg two.png'"):
        NYU(NYU.Split.TRAIN, tmp_path)


@pytest.mark.parametrize("kind", [ADE20K, NYU, CocoCaptions])
def test_what_is_missing_is_named(kind: type, tmp_path: Path) -> None:
    name = kind.__name__
    with pytest.raises(ValueError, match=f"{name} needs root"):
        kind(kind.Split.TRAIN)
    with pytest.raises(TypeError, match=rf"{name} needs split, one of {name}.Split.TRAIN.*; got None"):
        kind(root=tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{name}: .* is missing"):
        kind(kind.Split.TRAIN, tmp_path)
