"""Images that need no files: for dry runs and measurements."""

import functools
import io
from typing import Any

import numpy as np
from PIL import Image

from dinov3.data.datasets.extended import ExtendedVisionDataset


class SyntheticImages(ExtendedVisionDataset):
    """Smooth noise as JPEG files in memory, as large as ordinary photographs: they cost what those cost to decode.

    Args:
        **transforms: `transforms`, or `transform` and `target_transform`, as for the other datasets.
    """

    SIZE = (500, 375)  # width and height of most pictures of ImageNet

    def __init__(self, **transforms: Any) -> None:
        super().__init__(**transforms)

    def get_image_data(self, index: int) -> bytes:
        """JPEG file of image `index`."""
        return _jpeg(index % 16)

    def get_target(self, index: int) -> None:
        """No label."""
        return

    def __len__(self) -> int:
        return 1_000_000


@functools.cache
def _jpeg(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, size=(24, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(SyntheticImages.SIZE, Image.Resampling.BILINEAR).save(file, "JPEG", quality=90)
    return file.getvalue()
