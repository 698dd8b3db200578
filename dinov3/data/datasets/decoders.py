"""From stored bytes to images and targets."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import BytesIO
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_EXIF_ORIENTATION = 0x0112


class Decoder(Protocol):
    """Takes the stored data in its constructor and gives the decoded value."""

    def __init__(self, data: Any) -> None: ...

    def decode(self) -> Any:
        """The decoded value."""


class UndecodableImageError(RuntimeError):
    """An image can't be decoded; the cause says why."""


class EncodedImage:
    """An image whose pixels are not decoded yet, so that who needs fewer of them can say so.

    Args:
        data: the file's bytes.
        upright: turn it as the EXIF orientation says, without passing on Pillow's warnings about odd metadata.
    """

    def __init__(self, data: bytes, *, upright: bool = False) -> None:
        self._data = data
        self._upright = upright

    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of the full image, from its header.

        Raises:
            UndecodableImageError: it isn't an image.
        """
        with self._decoding():
            image = self._open()
            return image.size[::-1] if self._lies_down(image) else image.size

    def decode(self, reduce: int = 1) -> Image.Image:
        """The image in RGB (the first frame of an animated one).

        Args:
            reduce: give at least 1 / `reduce` of the pixels in each direction, if that is quicker. Only JPEG can,
                by 2, 4 and 8; other files come in full.

        Raises:
            UndecodableImageError: it can't be decoded.
        """
        with self._decoding():
            image = self._open()
            if reduce > 1:
                image.draft(None, (max(image.width // reduce, 1), max(image.height // reduce, 1)))
            return to_rgb(ImageOps.exif_transpose(image) if self._upright else image)

    def _open(self) -> Image.Image:
        return Image.open(BytesIO(self._data))

    def _lies_down(self, image: Image.Image) -> bool:
        return self._upright and image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)  # others mean nothing

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        try:
            with _no_warnings() if self._upright else nullcontext():
                yield
        except Exception as error:
            # Pillow names the address of the buffer, which tells nobody anything.
            reason = "cannot identify its format" if isinstance(error, UnidentifiedImageError) else repr(error)
            raise UndecodableImageError(f"can not decode the image: {reason}") from error


class ImageDataDecoder:
    """Encoded image -> PIL RGB image (the first frame of an animated one)."""

    upright = False

    def __init__(self, image_data: bytes) -> None:
        self._image_data = image_data

    def decode(self) -> Image.Image:
        """The image in RGB."""
        return self.encoded().decode()

    def encoded(self) -> EncodedImage:
        """The image, to be decoded later."""
        return EncodedImage(self._image_data, upright=self.upright)


class UprightImageDataDecoder(ImageDataDecoder):
    """The same, turned as the EXIF orientation says: for photographs straight from a camera."""

    upright = True


class DenseTargetDecoder:
    """Encoded label map or depth map -> PIL image as stored (mode kept)."""

    def __init__(self, image_data: bytes) -> None:
        self._image_data = image_data

    def decode(self) -> Image.Image:
        """The image in its own mode."""
        image = Image.open(BytesIO(self._image_data))
        image.load()
        return image


class TargetDecoder:
    """Any target, as it is."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def decode(self) -> Any:
        """The target."""
        return self._target


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB.

    16-bit grey values are scaled to 8 bits (Pillow would cut them off at 255); transparency is dropped.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):  # older Pillow opens 16-bit PNG files as "I"
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # converting at once would warn
    return image.convert("RGB")
