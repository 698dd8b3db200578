"""Images with any number of channels and bits: NPY, TIFF, and what Pillow reads."""

import math
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_NPY = b"\x93NUMPY"
# A wrong header must not keep this machine busy: bytes of pixels in any TIFF file, or for each of its own.
_ALWAYS_ALLOWED, _MAX_COMPRESSION = 1 << 28, 1 << 12
_MAX_PAGES = 1 << 12  # of a TIFF file; each may be a channel
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class MultiChannelDecoder:
    """Encoded image -> tensor [channels, H, W]: uint8 as stored, anything else as float32 in [0, 1].

    Values are divided by `max_value` and cut to [0, 1]; values that aren't finite (no data) become 0.

    Args:
        image_data: an NPY file [H, W], [H, W, channels] or [channels, H, W]; a TIFF file (needs tifffile, unless Pillow
            reads it); or an image that Pillow reads.
        channels: how many the image must have.
        max_value: stored value that stands for 1. None: the largest of an unsigned type, 1 for floats; 8-bit images
            then stay uint8.
    """

    def __init__(self, image_data: bytes, *, channels: int, max_value: float | None = None) -> None:
        self._image_data = image_data
        self._channels = channels
        self._max_value = max_value

    def decode(self) -> Tensor:
        """The image.

        Raises:
            ValueError: another number of channels, or a type without a largest value and no `max_value`.
        """
        values = self._channels_first(_read(self._image_data))
        if values.dtype == np.uint8 and self._max_value is None:
            return torch.from_numpy(np.array(values, order="C"))
        largest = self._max_value
        if largest is None:
            largest = _largest(values.dtype)
        scaled = np.nan_to_num(values.astype(np.float32) / largest, nan=0.0, posinf=0.0, neginf=0.0)
        return torch.from_numpy(np.ascontiguousarray(scaled.clip(0, 1), dtype=np.float32))

    def _channels_first(self, values: np.ndarray) -> np.ndarray:
        if values.ndim == 2:
            values = values[None]
        elif values.ndim == 3 and values.shape[2] == self._channels:
            values = values.transpose(2, 0, 1)
        if values.ndim != 3 or values.shape[0] != self._channels or values.size == 0:
            raise ValueError(f"expected an image of {self._channels} channels, got an array of shape {values.shape}")
        return values


def _largest(dtype: np.dtype[Any]) -> float:
    if dtype == np.bool_ or np.issubdtype(dtype, np.floating):
        return 1.0
    if np.issubdtype(dtype, np.unsignedinteger):
        return float(np.iinfo(dtype).max)
    raise ValueError(f"values of type {dtype} have no natural largest value: give max_value=<number>")


def _read(data: bytes) -> np.ndarray:
    if data.startswith(_NPY):
        return np.load(BytesIO(data), allow_pickle=False)
    if data.startswith(_TIFF):
        return _read_tiff(data)
    return _from_pillow(data)


def _read_tiff(data: bytes) -> np.ndarray:
    try:
        import tifffile
    except ImportError:
        return _from_pillow(data)
    with tifffile.TiffFile(BytesIO(data)) as file:
        _check_pages(file)
        n_bytes = math.prod(file.series[0].shape) * file.series[0].dtype.itemsize
        if n_bytes > max(_ALWAYS_ALLOWED, _MAX_COMPRESSION * len(data)):
            raise ValueError(f"a TIFF file of {len(data):,} bytes says that it holds {n_bytes:,}")
        return file.asarray()


def _check_pages(file: Any) -> None:
    """Refuse a TIFF file with too many pages, or whose chain of pages leads back to itself and has no end."""
    seen: set[int] = set()
    for page in file.pages:
        if page.offset in seen or len(seen) == _MAX_PAGES:
            raise ValueError(f"a TIFF file whose chain of pages does not end after {len(seen):,} of them")
        seen.add(page.offset)


def _from_pillow(data: bytes) -> np.ndarray:
    image: Image.Image = Image.open(BytesIO(data))
    if image.mode == "P":
        image = image.convert("RGB")
    elif image.mode == "I":  # older Pillow opens 16-bit PNG files so
        return np.asarray(image).clip(0, 2**16 - 1).astype(np.uint16)
    return np.asarray(image)
