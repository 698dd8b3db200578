"""Images named by a text, CSV or Parquet file."""

import csv
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov3.data.datasets.collection import LabelledCollection
from dinov3.data.datasets.packed import PackedStrings
from dinov3.utils.files import read_text

logger = logging.getLogger("dinov3")

_MAX_DIGITS = 18  # what certainly fits into 64 bits


class ImageList(LabelledCollection):
    """The images that a file names, in its order.

    The file is one of
    - `.csv` or `.tsv`, with a header: the image's path in the column `image_column`, its label in `label_column`;
    - `.parquet`, with these columns (needs pyarrow). Instead of a path, the image column may hold the encoded image, as
      bytes or as a structure with `bytes`;
    - anything else: one path per line, without labels.

    Labels that are whole numbers are kept; others are numbered in their sorted order (`class_names`). A file without
    the label column has targets of None.

    Args:
        file: that file.
        root: folder of the paths that aren't absolute; None: the folder of the file.
        image_column, label_column: names of columns.
        on_error, channels, max_value, transforms, transform, target_transform: see `ImageCollection`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names no image, or has no such column.
    """

    def __init__(
        self,
        *,
        file: str | Path,
        root: str | Path | None = None,
        image_column: str = "path",
        label_column: str = "label",
        on_error: str = "skip",
        channels: int | None = None,
        max_value: float | None = None,
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        file = Path(file).expanduser()
        super().__init__(
            root=file.parent if root is None else Path(root).expanduser(),
            on_error=on_error,
            channels=channels,
            max_value=max_value,
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )
        self._file = file
        if not file.is_file():
            raise FileNotFoundError(f"{type(self).__name__}: file={file} does not exist")
        self._encoded: Any = None
        images, labels = self._read(file, image_column, label_column)
        if len(images) == 0:
            raise ValueError(f"{type(self).__name__}: {file} names no image")
        self._paths = PackedStrings.pack(self._take(images, labels))
        logger.info(f"{type(self).__name__}: {len(self)} images in {file}")

    def _take(self, images: list[str], labels: list[Any] | None) -> list[str]:
        """Keep the labels of the file's rows; returns the images, by index."""
        self._targets, self._class_names = number_labels(labels, self._file)
        return images

    def __len__(self) -> int:
        return len(self._paths)

    def get_image_relpath(self, index: int) -> str:
        """Path of a sample as the file gives it."""
        return self._paths[index]

    def get_image_data(self, index: int) -> bytes:
        """The encoded image of a sample."""
        if self._encoded is not None:
            return self._encoded[index].as_py()
        return (Path(self.root) / self._paths[index]).read_bytes()

    def _read(self, file: Path, image_column: str, label_column: str) -> tuple[list[str], list[Any] | None]:
        if file.suffix == ".parquet":
            return self._read_parquet(file, image_column, label_column)
        if file.suffix not in (".csv", ".tsv"):
            return [line for line in read_text(file).splitlines() if line.strip()], None
        try:
            with file.open(newline="", encoding="utf-8") as opened:
                rows = csv.DictReader(opened, delimiter="\t" if file.suffix == ".tsv" else ",")
                columns = rows.fieldnames or []
                _require_column(file, image_column, columns, "image_column")
                table = list(rows)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{type(self).__name__}: {file} can't be read as a table: {error}") from error
        if any(not row[image_column] for row in table):
            raise ValueError(f"{type(self).__name__}: {file} has rows without {image_column}")
        labels = [row[label_column] for row in table] if label_column in columns else None
        return [row[image_column] for row in table], labels

    def _read_parquet(self, file: Path, image_column: str, label_column: str) -> tuple[list[str], list[Any] | None]:
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise ImportError(f"{type(self).__name__}: {file} needs pyarrow: pip install 'dinov3[formats]'") from error
        import pyarrow

        try:
            columns = parquet.read_schema(file).names
            _require_column(file, image_column, columns, "image_column")
            kept = [column for column in (image_column, label_column) if column in columns]
            table = parquet.read_table(file, columns=kept, memory_map=True)
            table.validate(full=True)
            n_rows = parquet.read_metadata(file).num_rows
            labels = table[label_column].to_pylist() if label_column in columns else None
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{type(self).__name__}: {file} can't be read as Parquet: {error}") from error
        if len(table) != n_rows:  # PyArrow believes what groups of rows say
            raise ValueError(f"{type(self).__name__}: {file} is damaged: {len(table)} rows of {n_rows} were found")
        images = table[image_column]
        if _is_struct(images):
            images = images.combine_chunks().field("bytes") if len(images) else images
        if _is_binary(images):
            self._encoded = images
            return [f"{file.name}[{row}]" for row in range(len(images))], labels
        paths = images.to_pylist()
        if not all(isinstance(path, str) and path for path in paths):
            raise ValueError(f"{type(self).__name__}: {file} has rows whose {image_column} is no path")
        return paths, labels


def number_labels(labels: Sequence[Any] | None, origin: object) -> tuple[np.ndarray | None, list[str]]:
    """Class indices, int64 [n], and the names by class index if labels aren't whole numbers.

    Args:
        labels: as stored; None: there are none.
        origin: where they come from, for messages.

    Raises:
        ValueError: some labels are missing.
    """
    if labels is None:
        return None, []
    texts = ["" if label is None else str(label) for label in labels]
    if "" in texts:
        raise ValueError(
            f"{origin}: sample {texts.index('')} has no label, while others have: give all a label, or none"
        )
    if all(text.removeprefix("-").isdecimal() for text in texts):
        if (longest := max(texts, key=len, default="")) and len(longest) > _MAX_DIGITS:
            raise ValueError(
                f"{origin}: a label has {len(longest)} digits: whole numbers of at most {_MAX_DIGITS} are classes"
            )
        return np.array([int(text) for text in texts], dtype=np.int64), []
    names = sorted(set(texts))
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[text] for text in texts], dtype=np.int64), names


def _require_column(file: Path, column: str, columns: Sequence[str], key: str) -> None:
    if column not in columns:
        raise ValueError(f"ImageList: {file} has no column {column!r} ({key}); its columns: {', '.join(columns)}")


def _is_struct(column: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_struct(column.type)


def _is_binary(column: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type)
