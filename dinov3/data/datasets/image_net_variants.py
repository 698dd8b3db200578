"""Test sets for ImageNet classifiers, in the folder layouts they are distributed in.

Class numbers are those of ImageNet. What stands for which class is read from files that come with a data set, never
from a list in here.
"""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinov3.data.datasets.collection import ImageCollection
from dinov3.data.datasets.decoders import ImageDataDecoder
from dinov3.data.datasets.image_net import read_labels
from dinov3.data.datasets.index_cache import load_or_build_index
from dinov3.utils.files import read_json, read_text

logger = logging.getLogger("dinov3")

_N_CLASSES = 1000
_LABELS_FILE = "labels.txt"
_WORDNET_ID = re.compile(r"n\d{8}")
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)


class _FolderDataset(ImageCollection):
    """Images of a folder, as stored (not turned by EXIF), with the targets that `_target_of` reads from their paths.

    Args:
        root: folder of the data set.
        images: the folder of the images, if that is another one.
        on_error: "raise" (a score over other images would be another score) or "skip".
        index_cache: see `index_cache.py`.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        images: Path | None = None,
        index_cache: str | Path | None = None,
        on_error: str = "raise",
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            root=root,
            on_error=on_error,
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )
        self.image_decoder = ImageDataDecoder
        self._folder = Path(root).expanduser() if images is None else images
        name = type(self).__name__
        if not self._folder.is_dir():
            raise FileNotFoundError(f"{name}: {self._folder} is not a folder")
        self._index = load_or_build_index(self._folder, index_cache)
        if len(self._index) == 0:
            raise ValueError(f"{name}: no image below {self._folder}")
        self._rows = np.arange(len(self._index))

    def __len__(self) -> int:
        return len(self._rows)

    def get_image_relpath(self, index: int) -> str:
        """Path of a sample below the folder of the images."""
        return self._index.path(int(self._rows[index]))

    def get_image_data(self, index: int) -> bytes:
        """The encoded image of a sample."""
        return (self._folder / self.get_image_relpath(index)).read_bytes()

    def _folders_of(self, index: int, depth: int, layout: str) -> list[str]:
        """The names of the folders above an image."""
        path = self.get_image_relpath(index)
        folders = list(Path(path).parts[:-1])
        if len(folders) != depth:
            raise ValueError(f"{type(self).__name__}: {self._folder / path} is not in the layout {layout}")
        return folders


class _ClassDataset(_FolderDataset):
    """Each image has one class: int targets."""

    _targets: np.ndarray

    def get_target(self, index: int) -> int:
        """Class number of a sample."""
        return int(self._targets[index])

    def get_targets(self) -> np.ndarray:
        """Class numbers of all samples, int64 [n]."""
        return self._targets


class ImageNetV2(_ClassDataset):
    """ImageNetV2 (Recht et al. 2019): `root/<class number>/*.jpeg`."""

    def __init__(self, *, root: str | Path, **options: Any) -> None:
        super().__init__(root=root, **options)
        numbers = [self._folders_of(i, 1, "<class number>/<image>")[0] for i in range(len(self))]
        if wrong := [n for n in numbers if not n.isdecimal() or int(n) >= _N_CLASSES]:
            raise ValueError(
                f"ImageNetV2: folder {wrong[0]!r} of {self._folder} is not a class number below {_N_CLASSES}"
            )
        self._targets = np.array(numbers, dtype=np.int64)


class ImageNetSketch(_ClassDataset):
    """ImageNet-Sketch (Wang et al. 2019): `root/<WordNet id>/*.JPEG`.

    Args:
        labels: ImageNet's `labels.txt` (rows `wnid,name` in order of class number); None: `root/labels.txt`. Not needed
            if there are folders of all 1000 classes, whose sorted ids then count.
        root, options: as for the others.
    """

    def __init__(self, *, root: str | Path, labels: str | Path | None = None, **options: Any) -> None:
        super().__init__(root=root, **options)
        folders = [self._folders_of(i, 1, "<WordNet id>/<image>")[0] for i in range(len(self))]
        self._targets = _class_numbers(type(self).__name__, self._folder, folders, labels)


class ImageNetSubset(ImageNetSketch):
    """ImageNet-A and -R (Hendrycks et al. 2021): `root/<WordNet id>/*.jpg`, of 200 classes.

    Scores of other classes are left out: `get_imagenet_class_mapping()` lists the classes that occur, and targets are
    positions in that list.

    Args:
        restrict: as said; False: no such method, and targets are ImageNet's class numbers (k-NN).
        labels, root, options: see `ImageNetSketch`.
    """

    def __init__(self, *, root: str | Path, restrict: bool = True, **options: Any) -> None:
        super().__init__(root=root, **options)
        if restrict:
            self._classes, self._targets = np.unique(self._targets, return_inverse=True)
            self.get_imagenet_class_mapping = self._class_mapping

    def _class_mapping(self) -> list[int]:
        return [int(number) for number in self._classes]


class ImageNetC(_FolderDataset):
    """ImageNet-C (Hendrycks and Dietterich 2019): `root/<corruption>/<level>/<WordNet id>/*.JPEG`.

    Targets are rows int64 [3]: class number, position of the corruption in `corruption_types`, level from 1 to 5.

    Args:
        labels, root, options: see `ImageNetSketch`.

    Attributes:
        corruption_types: names of the folders of corruptions, sorted.
    """

    def __init__(self, *, root: str | Path, labels: str | Path | None = None, **options: Any) -> None:
        super().__init__(root=root, **options)
        layout = "<corruption>/<level>/<WordNet id>/<image>"
        places = [self._folders_of(i, 3, layout) for i in range(len(self))]
        if wrong := [level for _, level, _ in places if level not in ("1", "2", "3", "4", "5")]:
            raise ValueError(f"ImageNetC: folder {wrong[0]!r} below {self._folder} is not a level from 1 to 5")
        self.corruption_types = sorted({corruption for corruption, _, _ in places})
        position = {name: i for i, name in enumerate(self.corruption_types)}
        numbers = _class_numbers("ImageNetC", self._folder, [folder for _, _, folder in places], labels)
        rows = [[position[corruption], int(level)] for corruption, level, _ in places]
        self._targets = np.concatenate([numbers[:, None], np.array(rows, dtype=np.int64)], axis=1)

    def get_target(self, index: int) -> np.ndarray:
        """The row of a sample."""
        return self._targets[index]

    def get_targets(self) -> np.ndarray:
        """The rows of all samples, int64 [n, 3]."""
        return self._targets


class _ListsDataset(_FolderDataset):
    """Each image may have several classes, or none: targets are lists (`ANY_MATCH_ACCURACY`)."""

    _targets: list[list[int]]

    def get_target(self, index: int) -> list[int]:
        """Class numbers of a sample."""
        return list(self._targets[index])

    def get_targets(self) -> list[list[int]]:
        """Class numbers of all samples."""
        return self._targets


class ImageNetReaL(_ListsDataset):
    """ImageNet's validation images with the labels of Beyer et al. 2020.

    Args:
        root: folder with `val`, the validation images as ImageNet has them (or in that folder itself).
        real: `real.json`, a list of class numbers for each image, in the order of their numbers; None:
            `root/real.json`.
        options: as for the others.
    """

    def __init__(self, *, root: str | Path, real: str | Path | None = None, **options: Any) -> None:
        root = Path(root).expanduser()
        super().__init__(root=root, images=root / "val" if (root / "val").is_dir() else root, **options)
        file = root / "real.json" if real is None else Path(real).expanduser()
        lists = _read_json("ImageNetReaL", file, "the classes of each validation image, from the authors' repository")
        numbers = []
        for i in range(len(self)):
            match = _VAL_NAME.fullmatch(Path(self.get_image_relpath(i)).name)
            if match is None or not 1 <= int(match[1]) <= len(lists):
                raise ValueError(
                    f"ImageNetReaL: {self._folder / self.get_image_relpath(i)} is not ILSVRC2012_val_<number>.JPEG "
                    f"with a number of the {len(lists)} entries of {file}"
                )
            numbers.append(int(match[1]))
        order = np.argsort(numbers)
        self._rows = self._rows[order]
        self._targets = [lists[numbers[i] - 1] for i in order]


class ObjectNet(_ListsDataset):
    """ObjectNet (Barbu et al. 2019), the part whose classes ImageNet has: `root/images/<folder>/*.png`.

    Scores of other classes are left out, as in `ImageNetSubset`.

    Args:
        root: the folder, with `mappings`: `folder_to_objectnet_label.json`, `objectnet_to_imagenet_1k.json`,
            `imagenet_to_label_2012_v2`, `pytorch_to_imagenet_2012_id.json`.
        restrict: see `ImageNetSubset`.
        border: pixels to cut off at each side: the images as published have a red frame.
        options: as for the others.
    """

    def __init__(self, *, root: str | Path, restrict: bool = True, border: int = 2, **options: Any) -> None:
        root = Path(root).expanduser()
        classes = _objectnet_classes(root / "mappings")
        super().__init__(root=root, images=root / "images", **options)
        self._border = border
        folders = [self._folders_of(i, 1, "images/<folder>/<image>")[0] for i in range(len(self))]
        kept = [i for i, folder in enumerate(folders) if folder in classes]
        if not kept:
            raise ValueError(f"ObjectNet: no folder of {self._folder} is one of an ImageNet class")
        self._rows = self._rows[kept]
        self._targets = [classes[folders[i]] for i in kept]
        if restrict:
            self._classes = sorted({number for numbers in classes.values() for number in numbers})
            position = {number: i for i, number in enumerate(self._classes)}
            self._targets = [[position[number] for number in numbers] for numbers in self._targets]
            self.get_imagenet_class_mapping = self._class_mapping

    def decode_image(self, index: int) -> Image.Image:
        """The decoded image of a sample, without its frame."""
        image = super().decode_image(index)
        cut = self._border
        return image.crop((cut, cut, image.width - cut, image.height - cut))

    def _class_mapping(self) -> list[int]:
        return list(self._classes)


def _class_numbers(name: str, folder: Path, wordnet_ids: Sequence[str], labels: str | Path | None) -> np.ndarray:
    """int64 [n]; see `ImageNetSketch` for `labels`."""
    found = sorted(set(wordnet_ids))
    if wrong := [entry for entry in found if not _WORDNET_ID.fullmatch(entry)]:
        raise ValueError(f"{name}: folder {wrong[0]!r} below {folder} is not a WordNet id (n and 8 digits)")
    file = folder / _LABELS_FILE if labels is None else Path(labels).expanduser()
    if file.is_file():
        known = [entry for entry, _ in read_labels(file)]
    elif labels is None and len(found) == _N_CLASSES:
        known = found
    else:
        raise FileNotFoundError(
            f"{name}: {file} is missing: ImageNet's list of classes, rows 'wnid,name' in order of class number. Copy "
            f"it there or give labels=<file>; {folder} has folders of {len(found)} classes, from which the numbers of "
            "ImageNet's 1000 can't be told"
        )
    numbers = {entry: i for i, entry in enumerate(known)}
    if unknown := [entry for entry in found if entry not in numbers]:
        raise ValueError(f"{name}: folders of {folder} that {file} doesn't list: {unknown[:10]}")
    return np.array([numbers[entry] for entry in wordnet_ids], dtype=np.int64)


def _objectnet_classes(mappings: Path) -> dict[str, list[int]]:
    """Folder -> ImageNet's class numbers, for the folders of ImageNet classes."""
    what = "part of ObjectNet's own archive"
    label_of_folder = _read_json("ObjectNet", mappings / "folder_to_objectnet_label.json", what)
    imagenet_names = _read_json("ObjectNet", mappings / "objectnet_to_imagenet_1k.json", what)
    id_of_number = _read_json("ObjectNet", mappings / "pytorch_to_imagenet_2012_id.json", what)
    names_file = mappings / "imagenet_to_label_2012_v2"
    if not names_file.is_file():
        raise FileNotFoundError(f"ObjectNet: {names_file} is missing: {what}")
    try:
        return _match_objectnet(names_file, label_of_folder, imagenet_names, id_of_number)
    except (TypeError, AttributeError, LookupError, OverflowError) as error:
        raise ValueError(f"ObjectNet: the files in {mappings} are not {what}: {error!r}") from error


def _match_objectnet(
    names_file: Path, label_of_folder: Any, imagenet_names: Any, id_of_number: Any
) -> dict[str, list[int]]:
    number_of_id = {int(found): int(number) for number, found in id_of_number.items()}
    number_of_name = {
        name.strip(): number_of_id[i] for i, name in enumerate(read_text(names_file).splitlines()) if i in number_of_id
    }
    classes = {}
    for folder, label in label_of_folder.items():
        if label not in imagenet_names:
            continue
        names = [name.strip() for name in imagenet_names[label].split(";")]
        if unknown := [name for name in names if name not in number_of_name]:
            raise ValueError(f"ObjectNet: {names_file} has no class {unknown[0]!r}, which {label!r} is said to be")
        classes[folder] = [number_of_name[name] for name in names]
    return classes


def _read_json(name: str, file: Path, what: str) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"{name}: {file} is missing: {what}")
    return read_json(file)
