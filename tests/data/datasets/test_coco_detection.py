"""Files in COCO's form: which objects count, how ids become classes, and files that are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3.data import make_dataset
from dinov3.data.datasets import CocoDetection
from dinov3.data.datasets.coco_detection import Categories
from tests.eval.detection.toy_coco import write_toy_coco


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    write_toy_coco(tmp_path)
    return tmp_path


def test_items(toy: Path) -> None:
    dataset = make_dataset(dataset_str=f"CocoDetection:split=train:root={toy}")
    assert isinstance(dataset, CocoDetection)
    assert len(dataset) == 4
    image, target = dataset[0]
    assert image.size == (64, 48)
    assert target["size"] == (48, 64)
    assert target["image_id"] == 1000
    assert target["labels"].tolist() == [3]  # the crowd is no object
    assert target["boxes"].shape == (1, 4)
    _, second = dataset[1]
    assert second["labels"].tolist() == [3, 14, 54]
    assert second["boxes"][-1].tolist() == [60, 40, 64, 48]  # clipped; the one outside is none
    _, last = dataset[3]
    assert last["boxes"].shape == (0, 4)
    assert last["labels"].shape == (0,)
    assert last["labels"].dtype == torch.int64


def test_other_layouts(toy: Path) -> None:
    (toy / "annotations" / "instances_train.json").rename(toy / "mine.json")
    dataset = CocoDetection(root=toy, annotations="mine.json", images="train")
    assert len(dataset) == 4
    (toy / "train").rename(toy / "here")
    with pytest.raises(FileNotFoundError, match="train is missing: it holds the images"):
        CocoDetection(root=toy, annotations="mine.json", images="train")
    with pytest.raises(ValueError, match="needs split, such as val2017, or annotations"):
        CocoDetection(root=toy)
    with pytest.raises(FileNotFoundError, match=r"nothing\.json is missing: it holds the objects"):
        CocoDetection(root=toy, annotations="nothing.json", images="here")


@pytest.mark.parametrize(
    ("ids", "classes", "n_classes"),
    [
        ((1, 2, 90), [1, 2, 90], 91),
        ((3, 14, 54), [3, 14, 54], 55),
        ((0, 1), [1, 2], 3),  # class 0 means "any object"
        ((7, 91), [1, 2], 3),
        ((1_000_000, 2_000_000, 5), [2, 3, 1], 4),
    ],
)
def test_classes(ids: tuple[int, ...], classes: list[int], n_classes: int) -> None:
    categories = Categories(tuple(sorted(ids)), tuple(f"c{i}" for i in sorted(ids)))
    assert [categories.class_of[i] for i in ids] == classes
    assert {label: categories.class_of[i] for label, i in categories.id_of.items()} == {c: c for c in classes}
    assert categories.n_classes == n_classes
    assert [categories.class_names[c] for c in classes] == [f"c{i}" for i in ids]
    assert len(categories.class_names) == n_classes
    assert categories.class_names[0] == ""


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {k: v for k, v in content.items() if k != key}


def _with_annotation(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    def change(content: dict[str, Any]) -> dict[str, Any]:
        content["annotations"][0] |= changes
        return content

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("categories"), "it has no list of categories"),
        (lambda content: [content], "no list of images, annotations, categories"),
        (lambda content: content | {"categories": []}, "refers to an image or category that isn't there"),
        (lambda content: content | {"categories": [], "annotations": []}, "has no categories"),
        (lambda content: content | {"images": content["images"] * 2}, r"ids of images occur twice: \[1000"),
        (_with_annotation(image_id=5), "annotation 1 refers to an image"),
        (_with_annotation(bbox=[1, 2, 3]), r"annotation 1 has no bbox \[left, top, width, height\]: \[1, 2, 3\]"),
    ],
)
def test_files_of_another_form_are_refused(toy: Path, change: Callable[[Any], Any], message: str) -> None:
    path = toy / "annotations" / "instances_train.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        CocoDetection(root=toy, split="train")
    path.write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        CocoDetection(root=toy, split="train")


def test_an_image_of_another_size_than_the_file_says_is_named(toy: Path) -> None:
    path = toy / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["images"][0]["width"] = 65
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"0\.png has 64 x 48 pixels, but .* says 65 x 48"):
        CocoDetection(root=toy, split="train")[0]
