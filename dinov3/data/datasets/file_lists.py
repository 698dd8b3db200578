"""Datasets given by a text file with one sample per line: what ADE20K and NYU share."""

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from dinov3.data.datasets.decoders import DenseTargetDecoder, ImageDataDecoder
from dinov3.data.datasets.extended import ExtendedVisionDataset

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
    """
    if not path.is_file():
        raise FileNotFoundError(f"{dataset}: {path} is missing: it lists the samples of this split, one per line")
    return sorted(line for line in path.read_text().splitlines() if line.strip())
