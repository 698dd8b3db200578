"""The list of images below a folder, and its cache on disk.

A cached list is used only if every folder it was made from still has the modification time it had then, which changes
when a file is added, removed or renamed. So a listing of a million files costs one `stat` per folder the next time.

Caches are NumPy files (no pickle), one per folder, in `$DINOV3_CACHE/image_folder`, by default
`$XDG_CACHE_HOME/dinov3/image_folder` or `~/.cache/dinov3/image_folder`. Where that can't be written, lists are made
anew. Indices of tar shards (`web_dataset.py`) lie beside them.
"""

import hashlib
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinov3.data.datasets.packed import PackedStrings

logger = logging.getLogger("dinov3")

# What Pillow decodes by default.
SUFFIXES = tuple(
    f".{name}"
    for name in ("bmp", "gif", "jfif", "jp2", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "ppm", "tif", "tiff", "webp")
)
_FORMAT = 1
# A folder changed less than this before it was listed may change again without a new modification time.
_SETTLED_S = 2.0


@dataclass(frozen=True)
class FolderIndex:
    """Images below a folder, sorted by path.

    Attributes:
        paths: relative to the folder.
        targets: position of each path's first folder in `class_names`, -1 for images directly in the folder; int32 [n].
        class_names: first-level folders that hold images, sorted.
    """

    paths: PackedStrings
    targets: np.ndarray
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def n_direct(self) -> int:
        """Images that lie directly in the folder."""
        return int(np.count_nonzero(self.targets < 0))

    def path(self, index: int) -> str:
        """Relative path of an image."""
        return self.paths[index]


def load_or_build_index(
    folder: Path, cache: str | Path | None = None, suffixes: tuple[str, ...] = SUFFIXES
) -> FolderIndex:
    """The images below `folder`, from the cache if that is still valid.

    Args:
        folder: an existing folder.
        cache: folder of the cache, "off" for none; None: the default place.
        suffixes: what the names of images end in, in lower case.
    """
    folder = folder.resolve()
    if cache == "off":
        return _scan(folder, suffixes)[0]
    identity = os.fsencode(folder) + ("" if suffixes == SUFFIXES else "\0".join(suffixes)).encode()
    kept_in = cache_folder("image_folder") if cache is None else Path(cache).expanduser()
    file = kept_in / (hashlib.sha256(identity).hexdigest()[:32] + ".npz")
    index = _read(file, folder)
    if index is None:
        index, folders = _scan(folder, suffixes)
        _write(file, index, folders)
    return index


def cache_folder(kind: str) -> Path:
    """Where indices of that kind are kept by default."""
    if own := os.environ.get("DINOV3_CACHE"):
        return Path(own).expanduser() / kind
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "dinov3" / kind


def _scan(folder: Path, suffixes: tuple[str, ...]) -> tuple[FolderIndex, dict[str, int]]:
    """The images below `folder`, and the modification time [ns] of each folder seen, by relative path.

    Hidden files and folders (`._photo.jpg`, `.thumbnails`) don't count. Links are followed, each folder is listed once.
    """
    paths: list[bytes] = []
    modified: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        relative = pending.pop()
        stat = (folder / relative).stat()
        if (stat.st_dev, stat.st_ino) in seen:  # a link back to a folder above, or to one listed already
            continue
        seen.add((stat.st_dev, stat.st_ino))
        modified[relative] = stat.st_mtime_ns
        with os.scandir(folder / relative) as entries:
            for entry in entries:
                path = os.path.join(relative, entry.name)
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append(path)
                elif entry.name.lower().endswith(suffixes) and entry.is_file():
                    paths.append(os.fsencode(path))
    return _make_index(sorted(paths)), modified


def _make_index(paths: list[bytes]) -> FolderIndex:
    separator = os.fsencode(os.sep)
    tops = [path.split(separator, 1)[0] if separator in path else None for path in paths]
    classes = {name: i for i, name in enumerate(sorted({top for top in tops if top is not None}))}
    return FolderIndex(
        paths=PackedStrings.pack(paths),
        targets=np.array([-1 if top is None else classes[top] for top in tops], dtype=np.int32),
        class_names=[os.fsdecode(name) for name in classes],
    )


def _joined(names: list[str]) -> np.ndarray:
    return np.frombuffer(b"\0".join(os.fsencode(name) for name in names), dtype=np.uint8)


def _split(joined: np.ndarray) -> list[str]:
    return [os.fsdecode(name) for name in joined.tobytes().split(b"\0")]


def _read(file: Path, folder: Path) -> FolderIndex | None:
    """The cached index, or None if there is none that still holds."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            if int(stored["format"]) != _FORMAT:
                return None
            folders, times = _split(stored["folders"]), stored["times"].tolist()
            if any((folder / name).stat().st_mtime_ns != at for name, at in zip(folders, times, strict=True)):
                return None
            return FolderIndex(
                paths=PackedStrings(stored["names"].tobytes(), stored["ends"]),
                targets=stored["targets"],
                class_names=_split(stored["class_names"]) if stored["class_names"].size else [],
            )
    except FileNotFoundError:  # no cache yet, or a folder has gone
        return None
    except Exception as error:  # a damaged archive can make its readers raise anything
        logger.warning(f"ignoring the cached list of images {file}, which can't be read: {error!r}")
        return None


def _write(file: Path, index: FolderIndex, folders: dict[str, int]) -> None:
    """Keep the index if the folders have settled and the place can be written; tell why if not."""
    if max(folders.values()) > time.time_ns() - _SETTLED_S * 1e9:
        logger.debug(f"not caching a list of images whose folders changed in the last {_SETTLED_S} s")
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as unfinished:
            partial = Path(unfinished) / file.name
            np.savez(
                partial,
                format=np.int64(_FORMAT),
                folders=_joined(list(folders)),
                times=np.array(list(folders.values()), dtype=np.int64),
                names=np.frombuffer(index.paths.joined, dtype=np.uint8),
                ends=index.paths.ends,
                targets=index.targets,
                class_names=_joined(index.class_names),
            )
            partial.replace(file)  # at once: another process never sees half a file
    except OSError as error:
        logger.info(f"the list of images can't be cached in {file.parent}: {error}")
