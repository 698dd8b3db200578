"""WebDataset shards: tar archives whose members share a name per sample, read in place.

Owns the index of the members (built once, cached as a NumPy file without pickle). Nothing is unpacked, so names in an
archive never become paths.
"""

import glob
import hashlib
import json
import logging
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinov3.data.datasets.collection import LabelledCollection
from dinov3.data.datasets.image_list import number_labels
from dinov3.data.datasets.index_cache import SUFFIXES, cache_folder
from dinov3.data.datasets.memory_maps import MemoryMaps
from dinov3.data.datasets.packed import PackedStrings

logger = logging.getLogger("dinov3")

_FORMAT = 1
_MAX_OPEN_SHARDS = 64
_MAX_LABEL_BYTES = 1 << 20


class _Sample(NamedTuple):
    shard: int
    key: str
    offset: int  # of the image's bytes
    size: int
    label_offset: int
    label_size: int  # 0: no label


class WebDataset(LabelledCollection):
    """All samples of the shards, in the order of the sorted shards and of their members.

    Members belong to a sample if their paths agree up to the first dot of the file name: `0001.jpg`, `0001.cls`.
    Samples without an image are left out. Access is random, so any sampler works.

    Args:
        root: a folder of `.tar` files, one such file, or a pattern (`/data/train-*.tar`). Archives are not compressed.
        label: ending of the member that holds the label, as text (`cls`), or `json:<field>`.
        index_cache: folder for the cached index, "off" for none; None: see `index_cache.py`.
        on_error, channels, max_value, transforms, transform, target_transform: see `ImageCollection`.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: a shard can't be read, there is no image, or only some samples have a label.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        label: str = "cls",
        index_cache: str | Path | None = None,
        on_error: str = "skip",
        channels: int | None = None,
        max_value: float | None = None,
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            root=root,
            on_error=on_error,
            channels=channels,
            max_value=max_value,
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )
        self._shards = _find_shards(root)
        self._maps = MemoryMaps(_MAX_OPEN_SHARDS)
        suffixes = SUFFIXES if channels is None else (*SUFFIXES, ".npy")
        self._index = _load_or_build(self._shards, label, suffixes, index_cache)
        if len(self) == 0:
            raise ValueError(f"WebDataset: no image in the {len(self._shards)} shards of {root}")
        self._take(self._read_labels(label))
        logger.info(f"{type(self).__name__}: {len(self)} images in {len(self._shards)} shards of {root}")

    def __len__(self) -> int:
        return len(self._index["numbers"])

    def get_image_relpath(self, index: int) -> str:
        """Name of the shard and key of a sample."""
        shard = self._shards[int(self._index["numbers"][index, 0])]
        return f"{shard.name}/{self._index['keys'][index]}"

    def get_image_data(self, index: int) -> bytes:
        """The encoded image of a sample."""
        shard, offset, size = self._index["numbers"][index, :3].tolist()
        return self._bytes(shard, offset, size)

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        data = self._maps[self._shards[shard]][offset : offset + size]
        if len(data) != size:
            raise ValueError(f"{self._shards[shard]} ends within a sample: it has changed or is truncated")
        return data

    def _take(self, labels: list[Any] | None) -> None:
        """Keep the labels of the samples, None for those without."""
        self._targets, self._class_names = number_labels(labels, self.root)

    def _read_labels(self, label: str) -> list[Any] | None:
        where = self._index["numbers"]
        if not where[:, 4].any():
            return None
        field = label.partition(":")[2]
        labels: list[Any] = []
        for shard, _, _, offset, size in where.tolist():
            try:
                text = self._bytes(shard, offset, min(size, _MAX_LABEL_BYTES)).decode().strip() if size else None
                labels.append(json.loads(text)[field] if text is not None and field else text)
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise ValueError(f"{self._shards[shard]} has a label that can't be read: {error!r}") from error
        return labels


def _find_shards(root: str | Path) -> list[Path]:
    path = Path(root).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(str(path)))
    if not found:
        raise FileNotFoundError(f"WebDataset: root={root} is no folder with .tar files, no file, and matches no file")
    return found


def _load_or_build(
    shards: list[Path], label: str, suffixes: tuple[str, ...], cache: str | Path | None
) -> dict[str, Any]:
    """`numbers` int64 [n, 5]: shard, offset and size of the image, offset and size of the label; `keys`."""
    stats = {str(shard.resolve()): shard.stat() for shard in shards}
    identity = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()]
    digest = hashlib.sha256(json.dumps([_FORMAT, label, suffixes, identity]).encode()).hexdigest()[:32]
    file = None
    if cache != "off":
        file = (cache_folder("web_dataset") if cache is None else Path(cache).expanduser()) / f"{digest}.npz"
        if (index := _read(file)) is not None:
            return index
    samples = [sample for i, shard in enumerate(shards) for sample in _scan(i, shard, label, suffixes)]
    numbers = [[s.shard, s.offset, s.size, s.label_offset, s.label_size] for s in samples]
    index = {
        "numbers": np.array(numbers, dtype=np.int64).reshape(-1, 5),
        "keys": PackedStrings.pack(sample.key for sample in samples),
    }
    if file is not None:
        _write(file, index)
    return index


def _scan(number: int, shard: Path, label: str, suffixes: tuple[str, ...]) -> Iterator[_Sample]:
    """The samples of one shard, from the headers of its members."""
    label_suffix = "." + label.partition(":")[0].lower()
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isreg() or member.issparse():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                if not stem:  # a hidden file
                    continue
                key = f"{folder}/{stem}" if folder else stem
                place = (member.offset_data, member.size)
                if f".{ending.lower()}".endswith(suffixes):
                    images.setdefault(key, place)
                elif f".{ending.lower()}" == label_suffix:
                    labels[key] = place
            require_the_end_of_the_archive(archive)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise ValueError(f"WebDataset: {shard} is not an uncompressed tar archive, or is damaged: {error}") from error
    for key, (offset, size) in images.items():
        yield _Sample(number, key, offset, size, *labels.get(key, (0, 0)))


def require_the_end_of_the_archive(archive: tarfile.TarFile) -> None:
    """Refuse an archive that doesn't end where its members, read by `tarfile`, have ended.

    `tarfile` takes a header that it can't read, or the end of a file that is cut off, for the end of the archive, and
    what comes after would be left out in silence.

    Raises:
        tarfile.ReadError: no blocks of zeros stand there, or something comes after them.
    """
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it is cut off: the zeros at its end are missing")
    while block:
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"after {archive.offset:,} bytes it has neither a member nor its end")
        block = file.read(1 << 20)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            keys = PackedStrings(stored["keys"].tobytes(), stored["ends"])
            return {"numbers": stored["numbers"], "keys": keys}
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged archive can make its readers raise anything
        logger.warning(f"ignoring the cached index {file}, which can't be read: {error!r}")
        return None


def _write(file: Path, index: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as unfinished:
            partial = Path(unfinished) / file.name
            keys = np.frombuffer(index["keys"].joined, dtype=np.uint8)
            np.savez(partial, numbers=index["numbers"], keys=keys, ends=index["keys"].ends)
            partial.replace(file)
    except OSError as error:
        logger.info(f"the index of the shards can't be cached in {file.parent}: {error}")
