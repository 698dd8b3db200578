"""Images with texts: from CSV and Parquet files, and from WebDataset shards; COCO's are in `coco_captions.py`."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov3.data.datasets.image_list import ImageList
from dinov3.data.datasets.packed import PackedStrings
from dinov3.data.datasets.web_dataset import WebDataset

Choose = Callable[[list[str]], str]


class Captions:
    """The texts of each of many images, in memory that worker processes share.

    Args:
        texts: one list of texts per image.

    Raises:
        ValueError: an image without text.
    """

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        empty = [i for i, own in enumerate(texts) if not own]
        if empty:
            raise ValueError(f"image {empty[0]} has no caption")
        self._texts = PackedStrings.pack(text for own in texts for text in own)
        self._ends = np.cumsum([len(own) for own in texts], dtype=np.int64)

    def __getitem__(self, index: int) -> list[str]:
        start = int(self._ends[index - 1]) if index else 0
        return [self._texts[i] for i in range(start, int(self._ends[index]))]


class CaptionList(ImageList):
    """The images that a file names, with their captions; rows that name the same image are its several captions.

    The file is one of those with columns that `ImageList` reads (CSV, TSV, Parquet). Items are (image, caption), the
    caption chosen anew at every access.

    Args:
        file, root, image_column: see `ImageList`.
        caption_column: name of the column with the caption.
        choose: picks from the list of an image's captions; default: `random.choice`.
        on_error, channels, max_value, transforms, transform, target_transform: see `ImageCollection`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names no image, has no such column, or has rows without a caption.
    """

    def __init__(
        self,
        *,
        file: str | Path,
        root: str | Path | None = None,
        image_column: str = "path",
        caption_column: str = "caption",
        choose: Choose | None = None,
        **others: Any,
    ) -> None:
        self._choose = choose or random.choice
        self._caption_column = caption_column
        super().__init__(file=file, root=root, image_column=image_column, label_column=caption_column, **others)

    def _take(self, images: list[str], labels: list[Any] | None) -> list[str]:
        if labels is None:
            raise ValueError(f"CaptionList: {self._file} has no column {self._caption_column!r} (caption_column)")
        self._targets, self._class_names = None, []
        missing = [i for i, label in enumerate(labels) if not label]
        if missing:
            raise ValueError(
                f"CaptionList: {self._file}: row {missing[0]} of {len(labels)} has no {self._caption_column}"
            )
        if self._encoded is not None:  # rows of bytes: each is an image of its own
            self._captions = Captions([[str(label)] for label in labels])
            return images
        by_image: dict[str, list[str]] = {}
        for image, label in zip(images, labels, strict=True):
            by_image.setdefault(image, []).append(str(label))
        self._captions = Captions(list(by_image.values()))
        return list(by_image)

    def get_captions(self, index: int) -> list[str]:
        """All captions of an image, in the order of the file."""
        return self._captions[index]

    def get_target(self, index: int) -> Any:
        """One caption of an image, chosen anew."""
        return self._choose(self.get_captions(index))


class WebDatasetCaptions(WebDataset):
    """The images of WebDataset shards with their captions; items are (image, caption).

    Args:
        root: see `WebDataset`.
        label: ending of the member that holds the caption as text (`txt`), or `json:<field>`, whose value is a text or
            a list of them; of several one is chosen anew at every access.
        choose: picks from the list of an image's captions; default: `random.choice`.
        others: see `WebDataset`.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: a shard can't be read, there is no image, or one without a caption.
    """

    def __init__(self, *, root: str | Path, label: str = "txt", choose: Choose | None = None, **others: Any) -> None:
        self._choose = choose or random.choice
        super().__init__(root=root, label=label, **others)

    def _take(self, labels: list[Any] | None) -> None:
        self._targets, self._class_names = None, []
        texts = [_texts(label) for label in labels or [None] * len(self)]
        without = [self.get_image_relpath(i) for i, own in enumerate(texts) if not own]
        if without:
            raise ValueError(
                f"WebDatasetCaptions: {len(without)} of {len(texts)} images have no caption, {without[0]} is the "
                "first: label=<ending> or label=json:<field> says where captions are"
            )
        self._captions = Captions(texts)

    def get_captions(self, index: int) -> list[str]:
        """All captions of an image."""
        return self._captions[index]

    def get_target(self, index: int) -> Any:
        """One caption of an image, chosen anew."""
        return self._choose(self.get_captions(index))


def _texts(label: Any) -> list[str]:
    if not label:
        return []
    return [str(text) for text in label] if isinstance(label, list) else [str(label)]
