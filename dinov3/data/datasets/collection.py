"""Base of the datasets of any images: unreadable ones are skipped, and images may have any number of channels."""

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dinov3.data.datasets.decoders import Decoder, TargetDecoder, UprightImageDataDecoder
from dinov3.data.datasets.extended import ExtendedVisionDataset, UnreadableSampleError
from dinov3.data.datasets.multichannel import MultiChannelDecoder
from dinov3.data.datasets.skipped import SkippedFiles

logger = logging.getLogger("dinov3")

_MAX_REPLACEMENTS = 1000


class ImageCollection(ExtendedVisionDataset):
    """Items are (image, target). A subclass gives `get_image_data`, `get_target`, `__len__` and `get_image_relpath`.

    Photographs are turned upright by their EXIF orientation. A sample that can't be read or decoded is replaced by the
    next one that can (image and target); `skipped` lists them, over all worker processes.

    Args:
        root: folder of the dataset.
        on_error: "skip" (as above) or "raise".
        channels: of the images, for others than RGB: TIFF, NPY, or what Pillow reads. Images are then tensors
            [channels, H, W], uint8 or float32 in [0, 1]; see `MultiChannelDecoder`.
        max_value: stored value that stands for 1; None: by the stored type.
        transforms, transform, target_transform: as for torchvision's datasets.

    Raises:
        ValueError: an unknown `on_error`, or impossible `channels` or `max_value`.
    """

    def __init__(
        self,
        *,
        root: str | Path | None,
        on_error: str = "skip",
        channels: int | None = None,
        max_value: float | None = None,
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        name = type(self).__name__
        if on_error not in ("skip", "raise"):
            raise ValueError(f"{name}: on_error must be 'skip' or 'raise', got {on_error!r}")
        if channels is not None and channels < 1 or max_value is not None and not max_value > 0:
            raise ValueError(f"{name}: channels and max_value must be positive, got {channels} and {max_value}")
        if channels is None and max_value is not None:
            raise ValueError(f"{name}: max_value is for images read with channels=<number>")
        decoder: Callable[[Any], Decoder] = UprightImageDataDecoder
        if channels is not None:
            decoder = partial(MultiChannelDecoder, channels=channels, max_value=max_value)
        super().__init__(
            image_decoder=decoder,
            target_decoder=TargetDecoder,
            root=root,
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )
        self.on_error = on_error
        self.channels = channels
        self.skipped = SkippedFiles()
        self._replaced: set[int] = set()

    def get_image_relpath(self, index: int) -> str:
        """Name of a sample, for messages and lists."""
        raise NotImplementedError(f"{type(self).__name__} does not define get_image_relpath")

    def get_targets(self) -> Any:
        """The targets of all samples, [n], or None without labels."""
        raise NotImplementedError(f"{type(self).__name__} does not define get_targets")

    @property
    def unreadable(self) -> dict[str, str]:
        """Name -> reason of the samples found unreadable so far."""
        return self.skipped.read()

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range: the dataset has {len(self)} images")
        first = index % len(self)
        n_tries = min(len(self), _MAX_REPLACEMENTS)
        for candidate in range(first, first + n_tries):
            candidate %= len(self)
            try:
                return super().__getitem__(candidate)
            except UnreadableSampleError as error:
                if self.on_error == "raise":
                    raise RuntimeError(f"can not read {self._place(candidate)}") from error
                self._note(candidate, error)
        raise RuntimeError(
            f"{type(self).__name__}: none of {n_tries} images from {self.get_image_relpath(first)} on can be decoded"
        )

    def was_skipped(self, index: int) -> bool:
        """Whether this process has found a sample unreadable, and has given another one in its place."""
        return index in self._replaced

    def _place(self, index: int) -> str:
        return os.path.join(self.root or "", self.get_image_relpath(index))

    def _note(self, index: int, error: UnreadableSampleError) -> None:
        self._replaced.add(index)
        if self.skipped.add(self.get_image_relpath(index), repr(error.__cause__)):
            logger.debug(f"{self._place(index)} can't be decoded, another image takes its place: {error.__cause__!r}")


class LabelledCollection(ImageCollection):
    """A collection whose labels are read once. A subclass sets `_targets` and `_class_names`."""

    _targets: np.ndarray | None
    _class_names: list[str]

    @property
    def class_names(self) -> list[str]:
        """Label by class index, if labels are text or named; otherwise empty."""
        return list(self._class_names)

    def get_target(self, index: int) -> int | None:
        """Class index of a sample, None without labels."""
        return None if self._targets is None else int(self._targets[index])

    def get_targets(self) -> np.ndarray | None:
        """Class indices of all samples, int64 [n]; None without labels."""
        return self._targets
