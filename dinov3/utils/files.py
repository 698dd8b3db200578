"""Files that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
