"""From stored bytes to images and targets."""

from io import BytesIO
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps


class Decoder(Protocol):
    """Takes the stored data in its constructor and gives the decoded value."""

    def __init__(self, data: Any) -> None: ...

    def decode(self) -> Any:
        """The decoded value."""


class ImageDataDecoder:
    """Encoded image -> PIL RGB image (the first frame of an animated one)."""

    def __init__(self, image_data: bytes) -> None:
        self._image_data = image_data

    def decode(self) -> Image.Image:
        """The image in RGB."""
        return to_rgb(Image.open(BytesIO(self._image_data)))


class UprightImageDataDecoder(ImageDataDecoder):
    """The same, turned as the EXIF orientation says: for photographs straight from a camera."""

    def decode(self) -> Image.Image:
        """The upright image in RGB."""
        return to_rgb(ImageOps.exif_transpose(Image.open(BytesIO(self._image_data))))


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


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB.

    16-bit grey values are scaled to 8 bits (Pillow would cut them off at 255); transparency is dropped.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):  # older Pillow opens 16-bit PNG files as "I"
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # converting at once would warn
    return image.convert("RGB")
