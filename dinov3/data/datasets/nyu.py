"""NYU Depth v2: images with depth maps."""

from collections.abc import Callable
from enum import Enum
from pathlib import Path
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
    TEST = "test"

    @property
    def list_file(self) -> str:
        """Name of the file that lists the samples: the validation and test samples are the same."""
        return "nyu_train.txt" if self is _Split.TRAIN else "nyu_test.txt"


class NYU(ImagePairDataset):
    """Images with depth maps as stored, as the list file pairs them.

    Args:
        split: `NYU.Split.TRAIN`, `VAL` or `TEST`.
        root: folder with `nyu_train.txt` and `nyu_test.txt`, each line holding the path of an image, that of its
            depth map and a focal length (not used).
        transforms, transform, target_transform: as for torchvision's datasets.

    Raises:
        ValueError: no root, or a line with other than three fields. TypeError: no split. FileNotFoundError: no list
            file.
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
        folder = require_root("NYU", root)
        self.split = require_split("NYU", split, _Split)
        pairs = [_parse(line, self.split.list_file) for line in read_lines("NYU", folder / self.split.list_file)]
        super().__init__(
            root=folder,
            image_paths=[image for image, _ in pairs],
            target_paths=[depth for _, depth in pairs],
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )


def _parse(line: str, file: str) -> tuple[str, str]:
    fields = line.split()
    if len(fields) != 3:
        raise ValueError(f"NYU: {file} must hold lines of three fields (image, depth map, focal length), got {line!r}")
    image, depth = (require_inside("NYU", name.strip("/"), file) for name in fields[:2])
    return image, depth
