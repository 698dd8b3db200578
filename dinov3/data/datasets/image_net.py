"""ImageNet-1k (ILSVRC 2012) in its original folder layout, with an index in NumPy files."""

import csv
import logging
from collections.abc import Callable
from enum import Enum
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from torchvision.datasets.folder import find_classes, make_dataset

from dinov3.data.datasets.decoders import ImageDataDecoder, TargetDecoder
from dinov3.data.datasets.extended import ExtendedVisionDataset
from dinov3.data.datasets.file_lists import read_index_array, require_inside, require_root, require_split, text_at

logger = logging.getLogger("dinov3")

_LABELS_FILE = "labels.txt"
_ENTRY_FIELDS = ("actual_index", "class_index", "class_id", "class_name")
_NO_CLASS = 2**32 - 1
_LENGTHS = {"train": 1_281_167, "val": 50_000, "test": 100_000}


class _Split(Enum):
    TRAIN = "train"
    VAL = "val"
    TEST = "test"

    @property
    def length(self) -> int:
        """Number of images of the official split."""
        return _LENGTHS[self.value]

    def get_dirname(self, class_id: str | None = None) -> str:
        """Folder of the split, or of one class in it, below the root."""
        return self.value if class_id is None else f"{self.value}/{class_id}"

    def get_image_relpath(self, actual_index: int, class_id: str | None = None) -> str:
        """Path of an image below the root, from the number in its name and its class (not used for TEST)."""
        if self is _Split.TEST:
            return f"{self.value}/ILSVRC2012_test_{actual_index:08d}.JPEG"
        if not class_id:
            raise ValueError(f"ImageNet: images of the split {self.name} lie in class folders: a class id is needed")
        name = f"{class_id}_{actual_index}" if self is _Split.TRAIN else f"ILSVRC2012_val_{actual_index:08d}"
        return f"{self.get_dirname(class_id)}/{name}.JPEG"

    def parse_image_relpath(self, image_relpath: str) -> tuple[str | None, int]:
        """(class id, None for TEST; number in the name) of an image's path below the root.

        Raises:
            ValueError: the path isn't one of this split.
        """
        path = PurePosixPath(image_relpath)
        class_id = None if self is _Split.TEST else path.parent.name
        number = path.stem.rsplit("_", 1)[-1]
        known = number.isdecimal() and class_id != ""
        if not known or self.get_image_relpath(int(number), class_id) != str(path.with_suffix(".JPEG")):
            raise ValueError(f"ImageNet: {image_relpath} is not the path of an image of the split {self.name}")
        return class_id, int(number)


class ImageNet(ExtendedVisionDataset):
    """Items are (RGB image, class index), None instead of the class for TEST.

    Args:
        split: `ImageNet.Split.TRAIN`, `VAL` or `TEST`.
        root: folder with `train`, `val`, `test` and `labels.txt` (rows `wnid,name` in order of class index; without
            it the classes are the sorted folder names).
        extra: folder of the index: `entries-<SPLIT>.npy`, `class-ids-<SPLIT>.npy`, `class-names-<SPLIT>.npy`. They are
            written by `dump_extra()` and memory-mapped at first use.
        transforms, transform, target_transform: as for torchvision's datasets.
    """

    Split = _Split

    def __init__(
        self,
        *,
        split: _Split,
        root: str | Path,
        extra: str | Path,
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            image_decoder=ImageDataDecoder,
            target_decoder=TargetDecoder,
            root=require_root("ImageNet", root),
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )
        self._split = require_split("ImageNet", split, _Split)
        if extra is None:
            raise ValueError("ImageNet needs extra, the folder of its index files (see ImageNet.dump_extra)")
        self._extra = Path(extra).expanduser()

    @property
    def split(self) -> _Split:
        """The split."""
        return self._split

    def __len__(self) -> int:
        return len(self._entries)

    def get_image_relpath(self, index: int) -> str:
        """Path of a sample's image below the root."""
        class_id = self.get_class_id(index)
        if class_id is not None:
            require_inside("ImageNet", class_id, self._extra_file("entries"))
        return self._split.get_image_relpath(int(self._entries[index]["actual_index"]), class_id)

    def get_image_data(self, index: int) -> bytes:
        """The encoded image of a sample."""
        return (Path(self.root) / self.get_image_relpath(index)).read_bytes()

    def get_target(self, index: int) -> int | None:
        """Class index of a sample, None for TEST."""
        return None if self._split is _Split.TEST else int(self._entries[index]["class_index"])

    def get_targets(self) -> np.ndarray | None:
        """Class index of every sample, [n]; None for TEST."""
        return None if self._split is _Split.TEST else self._entries["class_index"]

    def get_class_id(self, index: int) -> str | None:
        """WordNet id of a sample's class, None for TEST."""
        return None if self._split is _Split.TEST else self._text("entries", self._entries, index, "class_id")

    def get_class_name(self, index: int) -> str | None:
        """Name of a sample's class, None for TEST."""
        return None if self._split is _Split.TEST else self._text("entries", self._entries, index, "class_name")

    def find_class_id(self, class_index: int) -> str:
        """WordNet id of a class."""
        return self._text("class-ids", self._class_ids, class_index)

    def find_class_name(self, class_index: int) -> str:
        """Name of a class."""
        return self._text("class-names", self._class_names, class_index)

    def _text(self, kind: str, array: np.ndarray, index: int, field: str | None = None) -> str:
        return text_at("ImageNet", self._extra_file(kind), array, index, field)

    @cached_property
    def _entries(self) -> np.ndarray:
        entries = self._load("entries")
        if len(entries) != self._split.length:
            logger.warning(
                f"ImageNet: {len(entries)} images in the split {self._split.name}, "
                f"the official one has {self._split.length}"
            )
        return entries

    @cached_property
    def _class_ids(self) -> np.ndarray:
        return self._load("class-ids")

    @cached_property
    def _class_names(self) -> np.ndarray:
        return self._load("class-names")

    def _extra_file(self, kind: str) -> Path:
        return self._extra / f"{kind}-{self._split.name}.npy"

    def _load(self, kind: str) -> np.ndarray:
        path = self._extra_file(kind)
        if self._split is _Split.TEST and kind != "entries":
            raise ValueError("ImageNet: the classes of the split TEST are not public")
        if not path.is_file():
            raise FileNotFoundError(
                f"ImageNet: {path} is missing. Write the index once with dinov3.data.datasets.ImageNet("
                f"split=ImageNet.Split.{self._split.name}, root={str(self.root)!r}, "
                f"extra={str(self._extra)!r}).dump_extra()"
            )
        return read_index_array("ImageNet", path, _ENTRY_FIELDS if kind == "entries" else ())

    def dump_extra(self) -> None:
        """Write the index files of this split from the images below the root.

        Raises:
            FileNotFoundError: the root has no images of this split. ValueError: a file that doesn't belong there.
        """
        self._extra.mkdir(parents=True, exist_ok=True)
        if self._split is _Split.TEST:
            rows = [(number, _NO_CLASS, "", "") for number in range(1, self._split.length + 1)]
        else:
            classes = self._read_classes()
            rows = self._scan_images(classes)
            np.save(self._extra_file("class-ids"), np.array([class_id for class_id, _ in classes]))
            np.save(self._extra_file("class-names"), np.array([name for _, name in classes]))
        np.save(self._extra_file("entries"), _as_entries(rows))
        for name in ("_entries", "_class_ids", "_class_names"):  # read anew what has just changed
            self.__dict__.pop(name, None)

    def _read_classes(self) -> list[tuple[str, str]]:
        """(WordNet id, name) by class index."""
        labels = Path(self.root) / _LABELS_FILE
        if labels.is_file():
            return read_labels(labels)
        logger.warning(f"ImageNet: no {labels}: the class names are the folder names")
        names, _ = find_classes(str(Path(self.root) / self._split.get_dirname()))
        return [(name, name) for name in names]

    def _scan_images(self, classes: list[tuple[str, str]]) -> list[tuple[int, int, str, str]]:
        """The rows of the entries, classes by name and files by path."""
        folder = str(Path(self.root) / self._split.get_dirname())
        found, _ = find_classes(folder)
        index_and_name = {class_id: (index, name) for index, (class_id, name) in enumerate(classes)}
        if unknown := [class_id for class_id in found if class_id not in index_and_name]:
            raise ValueError(f"ImageNet: folders of {folder} that {_LABELS_FILE} doesn't list: {unknown[:10]}")
        class_positions = {name: i for i, name in enumerate(found)}
        samples = make_dataset(folder, class_positions, extensions=(".jpeg",), allow_empty=True)
        if not samples:
            raise FileNotFoundError(f"ImageNet: no .JPEG file in the class folders of {folder}")
        rows = []
        for path, position in samples:
            _, number = self._split.parse_image_relpath(Path(path).relative_to(self.root).as_posix())
            class_index, class_name = index_and_name[found[position]]
            rows.append((number, class_index, found[position], class_name))
        return rows


def read_labels(path: Path) -> list[tuple[str, str]]:
    """(WordNet id, name) by class index, of a `labels.txt`.

    Raises:
        ValueError: a row without a name.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read as a table: {error}") from error
    if short := [row for row in rows if len(row) < 2]:
        raise ValueError(f"{path}: rows must be 'wnid,name', got {','.join(short[0])!r}")
    return [(row[0], row[1]) for row in rows]


def _as_entries(rows: list[tuple[int, int, str, str]]) -> np.ndarray:
    """Structured array with strings as wide as the longest one."""
    id_width, name_width = (max((len(str(row[i])) for row in rows), default=0) for i in (2, 3))
    dtype = [
        ("actual_index", "<u4"),
        ("class_index", "<u4"),
        ("class_id", f"U{id_width}"),
        ("class_name", f"U{name_width}"),
    ]
    return np.array(rows, dtype=dtype)
