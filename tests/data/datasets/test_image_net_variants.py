"""Small copies of the layouts of public test sets."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from dinov3.data import DatasetWithEnumeratedTargets, make_dataset
from tests.helpers.images import class_image

IDS = ["n00000003", "n00000001", "n00000002", "n00000009"]  # in order of class number


def write(root: Path, *paths: str) -> None:
    for i, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        class_image(0, i, size=12).save(root / path, format="PNG")


def write_labels(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.txt").write_text("".join(f'{entry},"a, name"\n' for entry in IDS))
    return folder / "labels.txt"


def load(text: str) -> Any:
    return make_dataset(dataset_str=text)


def targets(dataset: Any) -> list[Any]:
    return [dataset[i][1] for i in range(len(dataset))]


def test_v2_folders_are_class_numbers(tmp_path: Path) -> None:
    write(tmp_path, "10/a.jpeg", "2/b.jpeg", "2/a.jpeg")
    dataset = load(f"ImageNetV2:root={tmp_path}")
    assert targets(dataset) == dataset.get_targets().tolist() == [10, 2, 2]
    assert dataset[1][0].tobytes() == class_image(0, 2, size=12).tobytes()
    write(tmp_path, "1000/a.jpeg")
    with pytest.raises(ValueError, match="folder '1000' of .* is not a class number below 1000"):
        load(f"ImageNetV2:root={tmp_path}:index_cache=off")


def test_sketch_takes_its_numbers_from_the_list_of_classes(tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "imagenet")
    write(tmp_path / "sketch", f"{IDS[3]}/a.JPEG", f"{IDS[0]}/a.JPEG")
    dataset = load(f"ImageNetSketch:root={tmp_path}/sketch:labels={labels}")
    assert targets(dataset) == [0, 3]
    assert not hasattr(dataset, "get_imagenet_class_mapping")
    with pytest.raises(FileNotFoundError, match=r"ImageNetSketch: .*sketch/labels.txt is missing.*of 2 classes"):
        load(f"ImageNetSketch:root={tmp_path}/sketch")


def test_all_classes_need_no_list(tmp_path: Path) -> None:
    for i in range(1000):
        folder = tmp_path / f"n{i * 7:08d}"
        folder.mkdir()
        (folder / "a.JPEG").write_bytes(b"")
    dataset = load(f"ImageNetSketch:root={tmp_path}")
    assert dataset.get_targets().tolist() == list(range(1000))
    with pytest.raises(RuntimeError, match="can not read .*n00000000/a.JPEG"):  # not replaced by a neighbour
        dataset[0]


@pytest.mark.parametrize("name", ["ImageNetA", "ImageNetR"])
def test_subsets_restrict_the_classes(tmp_path: Path, name: str) -> None:
    write_labels(tmp_path)
    write(tmp_path, f"{IDS[1]}/a.jpg", f"{IDS[3]}/a.jpg", f"{IDS[1]}/b.jpg")
    dataset = load(f"{name}:root={tmp_path}")
    assert dataset.get_imagenet_class_mapping() == [1, 3]
    assert targets(dataset) == [0, 0, 1]
    assert pickle.loads(pickle.dumps(dataset)).get_imagenet_class_mapping() == [1, 3]
    whole = load(f"{name}:root={tmp_path}:restrict=false")
    assert targets(whole) == [1, 1, 3]
    assert not hasattr(whole, "get_imagenet_class_mapping")


def test_corruptions_and_levels_are_part_of_the_target(tmp_path: Path) -> None:
    write_labels(tmp_path)
    write(tmp_path, f"snow/5/{IDS[2]}/a.JPEG", f"fog/1/{IDS[0]}/a.JPEG")
    dataset = load(f"ImageNetC:root={tmp_path}")
    assert dataset.corruption_types == ["fog", "snow"]
    assert dataset.get_targets().tolist() == [[0, 0, 1], [2, 1, 5]]
    batch = default_collate([DatasetWithEnumeratedTargets(dataset)[i][1] for i in range(2)])
    assert torch.equal(batch[1], torch.tensor([[0, 0, 1], [2, 1, 5]]))
    write(tmp_path, f"fog/6/{IDS[0]}/a.JPEG")
    with pytest.raises(ValueError, match="folder '6' below .* is not a level from 1 to 5"):
        load(f"ImageNetC:root={tmp_path}:index_cache=off")
    write(tmp_path, "fog/a.JPEG")
    with pytest.raises(ValueError, match="is not in the layout <corruption>/<level>/<WordNet id>/<image>"):
        load(f"ImageNetC:root={tmp_path}:index_cache=off")


@pytest.mark.parametrize("flat", [True, False])
def test_real_labels_follow_the_numbers_of_the_images(tmp_path: Path, flat: bool) -> None:
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in (3, 1, 2)]
    write(tmp_path, *[name if flat else f"val/{IDS[i]}/{name}" for i, name in enumerate(names)])
    (tmp_path / "real.json").write_text(json.dumps([[5], [], [7, 8]]))
    dataset = load(f"ImageNetReaL:root={tmp_path}")
    assert targets(dataset) == dataset.get_targets() == [[5], [], [7, 8]]
    assert dataset[0][0].tobytes() == class_image(0, 1, size=12).tobytes()
    (tmp_path / "real.json").write_text(json.dumps([[5]]))
    with pytest.raises(ValueError, match="with a number of the 1 entries"):
        load(f"ImageNetReaL:root={tmp_path}")
    with pytest.raises(FileNotFoundError, match="other.json is missing: the classes of each validation image"):
        load(f"ImageNetReaL:root={tmp_path}:real={tmp_path}/other.json")


MAPPINGS: dict[str, Any] = {
    "folder_to_objectnet_label.json": {"clock_folder": "Clock", "odd_folder": "Odd thing", "dog_folder": "Dog"},
    "objectnet_to_imagenet_1k.json": {"Clock": "wall clock; digital clock", "Dog": "dog"},
    "pytorch_to_imagenet_2012_id.json": {"40": 0, "7": 1, "12": 2},
    "imagenet_to_label_2012_v2": "dog\nwall clock\ndigital clock\n",
}


def write_objectnet(root: Path) -> None:
    write(root, "images/clock_folder/a.png", "images/odd_folder/a.png", "images/dog_folder/a.png")
    (root / "mappings").mkdir()
    for name, content in MAPPINGS.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (root / "mappings" / name).write_text(text)


def test_objectnet_reads_its_own_mappings(tmp_path: Path) -> None:
    write_objectnet(tmp_path)
    dataset = load(f"ObjectNet:root={tmp_path}")
    assert dataset.get_imagenet_class_mapping() == [7, 12, 40]
    assert [dataset.get_image_relpath(i) for i in range(2)] == ["clock_folder/a.png", "dog_folder/a.png"]
    assert targets(dataset) == [[0, 1], [2]]
    assert targets(load(f"ObjectNet:root={tmp_path}:restrict=false")) == [[7, 12], [40]]
    whole = np.asarray(load(f"ObjectNet:root={tmp_path}:border=0")[0][0])
    assert np.array_equal(np.asarray(dataset[0][0]), whole[2:-2, 2:-2])


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_missing_mapping_is_named(tmp_path: Path, name: str) -> None:
    write_objectnet(tmp_path)
    (tmp_path / "mappings" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"ObjectNet: .*{name} is missing: part of ObjectNet's own archive"):
        load(f"ObjectNet:root={tmp_path}")


def test_other_layouts_are_refused(tmp_path: Path) -> None:
    write_labels(tmp_path)
    write(tmp_path, "cat/a.JPEG")
    with pytest.raises(ValueError, match="folder 'cat' below .* is not a WordNet id"):
        load(f"ImageNetR:root={tmp_path}")
    write(tmp_path / "b", "n99999999/a.JPEG")
    with pytest.raises(ValueError, match=r"doesn't list: \['n99999999'\]"):
        load(f"ImageNetR:root={tmp_path}/b:labels={tmp_path}/labels.txt")
    with pytest.raises(FileNotFoundError, match="ImageNetV2: .*nothing is not a folder"):
        load(f"ImageNetV2:root={tmp_path}/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image below"):
        load(f"ImageNetV2:root={tmp_path}/empty")
