"""Files that appear whole or not at all, and text that is read with errors which say in which file they are."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file to write to; in the end it takes the place of `path`, safe on the disk.

    Readers see the old file or the whole new one, also when the writer is killed. The folder is made when needed; after
    an error nothing is left and the old file stays. What a writer that was killed has left, the next one removes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own: some libraries write to further temporary files beside the one that they were given.
    folder = path.with_name(f".{path.name}.tmp")
    _remove(folder)
    folder.mkdir()
    temporary = folder / path.name
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
    else:  # nothing, or a file of an earlier version
        folder.unlink(missing_ok=True)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8.

    Raises:
        ValueError: it holds other bytes; the message names the file.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is no JSON, or nested too deep; the message names the file.
    """
    try:
        return json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError(f"{path} can't be read as JSON: it is nested too deep") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
