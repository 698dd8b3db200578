"""Any folder of images with index masks: segmentation data of your own."""

from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from dinov3.data.datasets.pairs import PairFolder
from dinov3.utils.files import read_text

IGNORED = 255
CLASS_FILE = "classes.txt"


class MaskDecoder:
    """Encoded index mask -> Pillow image of class indices: 8 bits ("L") or 32 bits ("I").

    Masks are grey images of 1, 8 or 16 bits, or have a palette, whose indices count and whose colours don't.

    Args:
        image_data: the file's bytes.
        ignore_index: stored value of pixels that don't count; they become 255.
    """

    def __init__(self, image_data: bytes, ignore_index: int = IGNORED) -> None:
        self._image_data = image_data
        self._ignore_index = ignore_index

    def decode(self) -> Image.Image:
        """The mask.

        Raises:
            ValueError: colours instead of indices, or a value 255 that isn't the ignored one.
        """
        image = Image.open(BytesIO(self._image_data))
        if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
            raise ValueError(
                f"the mask is an image of mode {image.mode}, expected one channel of class indices (grey or palette): "
                "translate colours into indices first"
            )
        indices = np.asarray(image)
        if self._ignore_index != IGNORED:
            if (indices == IGNORED).any():
                raise ValueError(
                    f"the mask holds the value {IGNORED}, which means ignored, beside "
                    f"ignore_index={self._ignore_index}: number classes from 0 to {IGNORED - 1}"
                )
            indices = np.where(indices == self._ignore_index, IGNORED, indices)
        small = indices.max(initial=0) <= IGNORED
        return Image.fromarray(indices.astype(np.uint8 if small else np.int32))


class SegmentationFolder(PairFolder):
    """Items are (RGB image, mask of class indices with 255 for ignored pixels).

        <root>/images/[<split>/]a/b.jpg    <root>/annotations/[<split>/]a/b.png    <root>/classes.txt

    `masks` and `labels` are other names for `annotations`. `classes.txt` names the classes, one a line, in the order
    of their indices (of the reduced ones, where 0 is unlabelled).

    Args:
        root, split, images, annotations, ending, unmatched, transforms, transform, target_transform: see `PairFolder`.
        ignore_index: stored value of pixels that don't count, such as 65535 in masks of 16 bits.

    Raises:
        FileNotFoundError, ValueError: see `PairFolder`.

    Attributes:
        class_names: from `classes.txt`; None without it.
    """

    annotation_folders: ClassVar[tuple[str, ...]] = ("annotations", "masks", "labels")
    annotation_suffixes: ClassVar[tuple[str, ...]] = (".png", ".tif", ".tiff", ".bmp", ".pgm")  # that keep every value

    def __init__(
        self,
        root: str | Path | None = None,
        split: str | None = None,
        images: str | None = None,
        annotations: str | None = None,
        ending: str = "",
        unmatched: str = "raise",
        ignore_index: int = IGNORED,
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            root=root,
            split=split,
            images=images,
            annotations=annotations,
            ending=ending,
            unmatched=unmatched,
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )
        self.target_decoder = partial(MaskDecoder, ignore_index=ignore_index)
        self.class_names = _read_class_names(Path(self.root) / CLASS_FILE)


def _read_class_names(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]
