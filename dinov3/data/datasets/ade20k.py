"""ADE20K scene parsing: images with a map of 150 classes (0: none)."""

from collections.abc import Callable
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from dinov3.data.datasets.file_lists import (
    ImagePairDataset,
    read_lines,
    require_inside,
    require_root,
    require_split,
)


class _Split(Enum):
    TRAIN = "train"
    VAL = "val"

    @property
    def list_file(self) -> str:
        """Name of the file that lists the images of the split."""
        return f"ADE20K_object150_{self.value}.txt"


class ADE20K(ImagePairDataset):
    """Images `images/<name>` with label maps `annotations/<name without extension>.png`, values as stored.

    Args:
        split: `ADE20K.Split.TRAIN` or `VAL`.
        root: folder with `ADE20K_object150_{train,val}.txt`, `images` and `annotations`.
        transforms, transform, target_transform: as for torchvision's datasets.

    Raises:
        ValueError: no root, or a list that names files elsewhere. TypeError: no split. FileNotFoundError: no list file.
    """

    Split = _Split

    def __init__(
        self,
        split: _Split | None = None,
        root: str | Path | None = None,
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        folder = require_root("ADE20K", root)
        self.split = require_split("ADE20K", split, _Split)
        listed = folder / self.split.list_file
        names = [require_inside("ADE20K", name, listed) for name in read_lines("ADE20K", listed)]
        super().__init__(
            root=folder,
            image_paths=[f"images/{name}" for name in names],
            target_paths=[f"annotations/{PurePosixPath(name).with_suffix('.png')}" for name in names],
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )
