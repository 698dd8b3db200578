"""Any folder of images, without metadata files.

Owns how a folder is read: which files count, where labels come from. The list of files is kept in `index_cache.py`.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dinov3.data.datasets.collection import ImageCollection
from dinov3.data.datasets.index_cache import SUFFIXES, FolderIndex, load_or_build_index

logger = logging.getLogger("dinov3")

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}


class ImageFolder(ImageCollection):
    """All images below a folder, in the order of their paths.

    Labels are the first-level folders, sorted by name. With no sub-folders, or with images beside them, there are no
    labels: targets are None.

    Args:
        root: the folder.
        split: name of a sub-folder to use instead (`train`, `val`, ...; upper case is taken as lower case if only
            that exists).
        index_cache: folder for the cached list of files, "off" for none; None: see `index_cache.py`.
        on_error, channels, max_value, transforms, transform, target_transform: see `ImageCollection`. With `channels`,
            `.npy` files count as well.

    Raises:
        FileNotFoundError: the folder doesn't exist.
        ValueError: it holds no image.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        split: str | None = None,
        index_cache: str | Path | None = None,
        on_error: str = "skip",
        channels: int | None = None,
        max_value: float | None = None,
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            root=root,
            on_error=on_error,
            channels=channels,
            max_value=max_value,
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )
        self.split = split
        self._folder = _choose_folder(Path(root).expanduser(), split)
        suffixes = SUFFIXES if channels is None else (*SUFFIXES, ".npy")
        self._index = load_or_build_index(self._folder, index_cache, suffixes)
        if len(self._index) == 0:
            raise ValueError(f"ImageFolder: no image below {self._folder} (looked for {', '.join(suffixes)})")
        self._class_names = _class_names(self._index, self._folder, warn_of_splits=split is None)
        logger.info(
            f"ImageFolder: {len(self)} images below {self._folder}, "
            + (f"{len(self._class_names)} classes" if self._class_names else "no labels")
        )

    def __len__(self) -> int:
        return len(self._index)

    @property
    def class_names(self) -> list[str]:
        """Folder name by class index; empty if there are no labels."""
        return list(self._class_names)

    def get_class_name(self, index: int) -> str | None:
        """Name of a sample's class, None without labels."""
        target = self.get_target(index)
        return None if target is None else self._class_names[target]

    def get_target(self, index: int) -> int | None:
        """Class index of a sample, None without labels."""
        return int(self._index.targets[index]) if self._class_names else None

    def get_targets(self) -> np.ndarray | None:
        """Class indices of all samples, int64 [n]; None without labels."""
        return self._index.targets.astype(np.int64) if self._class_names else None

    def get_image_relpath(self, index: int) -> str:
        """Path of a sample below the folder (of the split)."""
        return self._index.path(index)

    def _place(self, index: int) -> str:
        return str(self._folder / self._index.path(index))

    def get_image_data(self, index: int) -> bytes:
        """The encoded image of a sample."""
        return (self._folder / self._index.path(index)).read_bytes()


def _choose_folder(root: Path, split: str | None) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"ImageFolder: root={root} is not a folder")
    if split is None:
        return root
    for name in (split, split.lower()):
        if (root / name).is_dir():
            return root / name
    found = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())[:20]) or "none"
    raise FileNotFoundError(f"ImageFolder: split={split}, but {root} has no folder of that name; its folders: {found}")


def _class_names(index: FolderIndex, folder: Path, *, warn_of_splits: bool) -> list[str]:
    if index.n_direct:
        if index.class_names:
            logger.warning(
                f"ImageFolder: {index.n_direct} images lie directly in {folder}, beside its sub-folders: they would "
                "have no class, so the whole dataset goes without labels"
            )
        return []
    if warn_of_splits and len(index.class_names) > 1 and {name.lower() for name in index.class_names} <= _SPLIT_NAMES:
        logger.warning(
            f"ImageFolder: the classes of {folder} are {', '.join(index.class_names)}, which look like splits: "
            "choose one with split=<name>"
        )
    return index.class_names
