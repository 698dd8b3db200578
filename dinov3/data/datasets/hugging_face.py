"""Datasets in the format of the Hugging Face library `datasets`, on disk."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinov3.data.datasets.collection import LabelledCollection
from dinov3.data.datasets.file_lists import require_inside
from dinov3.data.datasets.image_list import number_labels

logger = logging.getLogger("dinov3")


class HuggingFaceDataset(LabelledCollection):
    """A dataset that `datasets.Dataset.save_to_disk` (or `DatasetDict.save_to_disk`) wrote.

    Args:
        root: the folder.
        split: which part, for a folder of several.
        image_column, label_column: columns of the image and of the class. Without the latter, targets are None.
        on_error, channels, max_value, transforms, transform, target_transform: see `ImageCollection`.

    Raises:
        ImportError: the library isn't there. FileNotFoundError: there is no dataset in the folder.
        ValueError: a split or column that doesn't exist.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        split: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        on_error: str = "skip",
        channels: int | None = None,
        max_value: float | None = None,
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        root = Path(root).expanduser()
        super().__init__(
            root=root,
            on_error=on_error,
            channels=channels,
            max_value=max_value,
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )
        table = _load(root, split)
        if image_column not in table.column_names:
            raise ValueError(
                f"HuggingFace: {root} has no column {image_column!r} (image_column); "
                f"its columns: {', '.join(table.column_names)}"
            )
        self._targets = None
        self._class_names = []
        if label_column in table.column_names:
            self._targets, self._class_names = number_labels(table.with_format(None)[label_column][:], root)
            self._class_names = list(getattr(table.features[label_column], "names", None) or self._class_names)
        self._images = _encoded_images(table, image_column)
        self._image_column = image_column
        logger.info(f"HuggingFace: {len(self)} images in {root}")

    def __len__(self) -> int:
        return len(self._images)

    def get_image_relpath(self, index: int) -> str:
        """The row of a sample."""
        return f"row {index % len(self)}"

    def get_image_data(self, index: int) -> bytes:
        """The encoded image of a sample."""
        value = self._images[int(index)][self._image_column]
        if isinstance(value, bytes):
            return value
        if value["bytes"] is not None:
            return value["bytes"]
        # Datasets that were saved hold their images. A path would be that of a file on the machine where it was made.
        path = require_inside("HuggingFace", value["path"], self.root)
        return (Path(self.root) / path).read_bytes()


def _load(root: Path, split: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("HuggingFace: reading this needs datasets: pip install 'dinov3[formats]'") from error
    if not root.is_dir():
        raise FileNotFoundError(f"HuggingFace: root={root} is not a folder")
    loaded = datasets.load_from_disk(str(root))
    if isinstance(loaded, datasets.DatasetDict):
        if split is None and len(loaded) == 1:
            return next(iter(loaded.values()))
        if split not in loaded:
            raise ValueError(f"HuggingFace: split={split}, but {root} has {', '.join(loaded)}")
        return loaded[split]
    if split is not None:
        raise ValueError(f"HuggingFace: split={split}, but {root} is a single dataset: leave split out")
    return loaded


def _encoded_images(table: Any, column: str) -> Any:
    """The column of images alone, not decoded."""
    import datasets

    images = table.select_columns([column]).with_format(None)
    if isinstance(table.features[column], datasets.Image):
        images = images.cast_column(column, datasets.Image(decode=False))
    return images
