"""Base of the datasets: bytes and target by index, decoded, then transformed together."""

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchvision.datasets import VisionDataset

from dinov3.data.datasets.decoders import (
    Decoder,
    ImageDataDecoder,
    TargetDecoder,
    UndecodableImageError,
)

# What a network file system answers while a server is away; the same read may work a moment later.
_PASSING = {errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE, errno.ENOTCONN, errno.ECONNRESET}
_PAUSES_S = (0.1, 1.0)


class UnreadableSampleError(RuntimeError):
    """The image of a sample can't be read or decoded; the cause says why."""


class ExtendedVisionDataset(VisionDataset):
    """Items are (decoded image, decoded target), passed through `transforms`.

    A subclass gives `get_image_data`, `get_target` and `__len__`. A `transform` whose attribute `takes_encoded` is true
    gets the image before it is decoded (`EncodedImage`), if the decoder can give it so.

    Args:
        image_decoder, target_decoder: made from the data of an item; their `decode()` is the item.
        root: folder of the dataset.
        transforms: called with (image, target); or
        transform, target_transform: called with one of them each.
    """

    def __init__(
        self,
        image_decoder: Callable[[Any], Decoder] = ImageDataDecoder,
        target_decoder: Callable[[Any], Decoder] = TargetDecoder,
        root: str | Path | None = None,
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            root=root,
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )
        self.image_decoder = image_decoder
        self.target_decoder = target_decoder

    def get_image_data(self, index: int) -> bytes:
        """The encoded image of a sample."""
        raise NotImplementedError(f"{type(self).__name__} does not define get_image_data")

    def get_target(self, index: int) -> Any:
        """The target of a sample, not yet decoded."""
        raise NotImplementedError(f"{type(self).__name__} does not define get_target")

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} does not define __len__")

    def decode_image(self, index: int) -> Any:
        """The decoded image of a sample.

        Raises:
            UnreadableSampleError: it can't be read or decoded; a `RuntimeError`, whose cause says why.
        """
        try:
            return self.image_decoder(self._image_data(index)).decode()
        except Exception as error:
            raise _unreadable(index) from _reason(error)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = self._image_for_transform(index)
        target = self.target_decoder(self.get_target(index)).decode()
        if self.transforms is None:
            return image, target
        try:
            return self.transforms(image, target)
        except UndecodableImageError as error:
            raise _unreadable(index) from _reason(error)

    def _image_data(self, index: int) -> bytes:
        """The encoded image; errors of the file system that pass are waited for, a second at most."""
        for pause in _PAUSES_S:
            try:
                return self.get_image_data(index)
            except OSError as error:
                if error.errno not in _PASSING:
                    raise
                time.sleep(pause)
        return self.get_image_data(index)

    def _image_for_transform(self, index: int) -> Any:
        """The image as the transform takes it."""
        if not getattr(self.transform, "takes_encoded", False):
            return self.decode_image(index)
        try:
            decoder = self.image_decoder(self._image_data(index))
            return decoder.encoded() if isinstance(decoder, ImageDataDecoder) else decoder.decode()
        except Exception as error:
            raise _unreadable(index) from _reason(error)


def _unreadable(index: int) -> UnreadableSampleError:
    return UnreadableSampleError(f"can not read image for sample {index}")


def _reason(error: Exception) -> BaseException:
    return error.__cause__ or error if isinstance(error, UndecodableImageError) else error
