"""Datasets given by a text file with one sample per line: what ADE20K and NYU share."""

from collections.abc import Callable
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, TypeVar

import numpy as np

from dinov3.data.datasets.decoders import DenseTargetDecoder, ImageDataDecoder
from dinov3.data.datasets.extended import ExtendedVisionDataset
from dinov3.utils.files import read_text

_TEXTS = ("class_id", "class_name", "filename")

SplitT = TypeVar("SplitT", bound=Enum)


class ImagePairDataset(ExtendedVisionDataset):
    """Items are (RGB image, target image as stored).

    Attributes:
        image_paths, target_paths: relative to `root`, in the order of the samples.
    """

    def __init__(
        self,
        *,
        root: str | Path | None,
        image_paths: list[str],
        target_paths: list[str],
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            image_decoder=ImageDataDecoder,
            target_decoder=DenseTargetDecoder,
            root=root,
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )
        self.image_paths = image_paths
        self.target_paths = target_paths

    def __len__(self) -> int:
        return len(self.image_paths)

    def get_image_relpath(self, index: int) -> str:
        """Path of a sample's image below the root."""
        return self.image_paths[index]

    def get_image_data(self, index: int) -> bytes:
        """The encoded image of a sample."""
        return (Path(self.root) / self.image_paths[index]).read_bytes()

    def get_target(self, index: int) -> bytes:
        """The encoded target image of a sample."""
        return (Path(self.root) / self.target_paths[index]).read_bytes()


def require_root(dataset: str, root: str | Path | None) -> Path:
    """The root as a path.

    Raises:
        ValueError: no root was given.
    """
    if root is None:
        raise ValueError(
            f"{dataset} needs root, the folder that holds the dataset (in a dataset string: {dataset}:root=<DIR>)"
        )
    return Path(root).expanduser()


def require_split(dataset: str, split: SplitT | None, kind: type[SplitT]) -> SplitT:
    """The split.

    Raises:
        TypeError: it isn't a member of the dataset's own `Split`.
    """
    if not isinstance(split, kind):
        members = ", ".join(f"{dataset}.Split.{member.name}" for member in kind)
        raise TypeError(f"{dataset} needs split, one of {members}; got {split!r}")
    return split


def read_lines(dataset: str, path: Path) -> list[str]:
    """The non-empty lines of a list file, sorted.

    Raises:
        FileNotFoundError: the list is missing.
        ValueError: it is no text, or names nothing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{dataset}: {path} is missing: it lists the samples of this split, one per line")
    lines = sorted(line for line in read_text(path).splitlines() if line.strip())
    if not lines:
        raise ValueError(f"{dataset}: {path} is empty: it lists the samples of this split, one per line")
    return lines


def read_index_array(dataset: str, path: Path, fields: tuple[str, ...]) -> np.ndarray:
    """An array [n] of an index, mapped into memory.

    Args:
        dataset, path: for messages; the `.npy` file.
        fields: names that it must have; none: it holds text.

    Raises:
        ValueError: it is damaged, or another array.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a damaged header can make its parser raise anything
        raise ValueError(f"{dataset}: {path} is damaged, or no NumPy file: {error}") from error
    kinds = {name: array.dtype[name].kind for name in array.dtype.names or ()} or {"": array.dtype.kind}
    wanted = {name: ("U",) if name in _TEXTS else ("u", "i") for name in fields} or {"": ("U",)}
    if array.ndim != 1 or any(kinds.get(name) not in allowed for name, allowed in wanted.items()):
        raise ValueError(f"{dataset}: {path} holds {array.dtype} {array.shape}, expected an index: write it anew")
    return array


def text_at(dataset: str, path: Path, array: np.ndarray, index: int, field: str | None = None) -> str:
    """A text of an array of an index, in which a character is stored as four bytes, whatever they are.

    Args:
        dataset, path: for messages; the file that the array is from.
        array: from `read_index_array`.
        index: of the row.
        field: name of a field with text; None: the array holds nothing else.

    Raises:
        ValueError: some of the bytes are no characters.
    """
    try:
        text = array[index] if field is None else array[index][field]
        return text.encode("utf-32", "surrogatepass").decode("utf-32")
    except (SystemError, UnicodeError) as error:
        raise ValueError(f"{dataset}: {path} is damaged: row {index} holds no text: {error}") from error


def require_inside(dataset: str, name: Any, origin: object) -> str:
    """A path that a file of a data set gives, which has to lie below the data set's folder.

    Data sets come from strangers: what one names must not be any other file of this machine.

    Raises:
        ValueError: it is no text, names no file ("."), is absolute, or leads upwards.
    """
    if not isinstance(name, str) or "\0" in name or not PurePath(name).name:
        raise ValueError(f"{dataset}: {origin} must name files, got {name!r}")
    path = PurePath(name)
    if path.is_absolute() or path.drive or ".." in path.parts:
        raise ValueError(f"{dataset}: {origin} names {name!r}, which isn't below the folder of the data set")
    return name
