"""ImageNet-22k as one tar archive per class, read in place through memory maps."""

import gzip
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dinov3.data.datasets.decoders import ImageDataDecoder, TargetDecoder
from dinov3.data.datasets.extended import ExtendedVisionDataset
from dinov3.data.datasets.file_lists import read_index_array, require_inside, require_root, text_at
from dinov3.data.datasets.memory_maps import MemoryMaps
from dinov3.data.datasets.web_dataset import require_the_end_of_the_archive
from dinov3.utils.files import read_text

_BLOCK = 512
_GZIP_MAGIC = b"\x1f\x8b"
_SKIPPED = frozenset({"n06470073_47249.JPEG"})  # not an image, in the archive as distributed
_LOG_LINE = re.compile(r"block (\d+): (.*)")
_ENTRIES, _CLASS_IDS = "entries.npy", "class-ids.npy"
_ENTRY_FIELDS = ("class_index", "class_id", "start_offset", "end_offset", "filename")
_LOG_END = "** Block of NULs **"


class _Member(NamedTuple):
    """One file of an archive: from its header to the end of its padded data, in bytes."""

    start: int
    end: int
    filename: str


class ImageNet22k(ExtendedVisionDataset):
    """Items are (RGB image, class index).

    Args:
        root: folder with one uncompressed `<wnid>.tar` per class.
        extra: folder of the index, `entries.npy` and `class-ids.npy`, which `dump_extra()` writes.
        transforms, transform, target_transform: as for torchvision's datasets.
        mmap_cache_size: archives kept open at most.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        extra: str | Path,
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
        mmap_cache_size: int = 16,
    ) -> None:
        super().__init__(
            image_decoder=ImageDataDecoder,
            target_decoder=TargetDecoder,
            root=require_root("ImageNet22k", root),
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )
        if extra is None:
            raise ValueError("ImageNet22k needs extra, the folder of its index files (see ImageNet22k.dump_extra)")
        self._extra = Path(extra).expanduser()
        self._archives = MemoryMaps(mmap_cache_size)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        # Many of these files have odd metadata, of which Pillow warns.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().__getitem__(index)

    def get_image_data(self, index: int) -> bytes:
        """The encoded image of a sample, with the archive's zero padding at its end."""
        entry = self._entries[index]
        class_id = require_inside("ImageNet22k", self.get_class_id(index), self._extra / _ENTRIES)
        archive = self._archives[Path(self.root) / f"{class_id}.tar"]
        data = archive[int(entry["start_offset"]) + _BLOCK : int(entry["end_offset"])]
        return gzip.decompress(data) if data.startswith(_GZIP_MAGIC) else data

    def get_target(self, index: int) -> int:
        """Class index of a sample."""
        return int(self._entries[index]["class_index"])

    def get_targets(self) -> np.ndarray:
        """Class index of every sample, [n]."""
        return self._entries["class_index"]

    def get_class_id(self, index: int) -> str:
        """WordNet id of a sample's class."""
        return text_at("ImageNet22k", self._extra / _ENTRIES, self._entries, index, "class_id")

    def get_class_ids(self) -> np.ndarray:
        """WordNet ids by class index."""
        return self._class_ids

    def find_class_id(self, class_index: int) -> str:
        """WordNet id of a class."""
        return text_at("ImageNet22k", self._extra / _CLASS_IDS, self._class_ids, class_index)

    @cached_property
    def _entries(self) -> np.ndarray:
        return self._load(_ENTRIES)

    @cached_property
    def _class_ids(self) -> np.ndarray:
        return self._load(_CLASS_IDS)

    def _load(self, name: str) -> np.ndarray:
        path = self._extra / name
        if not path.is_file():
            raise FileNotFoundError(
                f"ImageNet22k: {path} is missing. Write the index once with dinov3.data.datasets.ImageNet22k("
                f"root={str(self.root)!r}, extra={str(self._extra)!r}).dump_extra()"
            )
        wanted = _ENTRY_FIELDS if name == _ENTRIES else ()
        return read_index_array("ImageNet22k", path, wanted)

    def dump_extra(self) -> None:
        """Write the index files, from the archives' block logs (`root/blocks/<wnid>.log`) or else from the archives.

        Raises:
            FileNotFoundError: no archives below the root. ValueError: an unreadable log or archive.
        """
        root = Path(self.root)
        class_ids = sorted(path.stem for path in root.glob("*.tar"))
        if not class_ids:
            raise FileNotFoundError(f"ImageNet22k: no <wnid>.tar in {root}")
        rows = []
        for class_index, class_id in enumerate(class_ids):
            log = root / "blocks" / f"{class_id}.log"
            members = list(_members_from_log(log) if log.is_file() else _members_from_archive(root / f"{class_id}.tar"))
            if not members:
                raise ValueError(f"ImageNet22k: {root / f'{class_id}.tar'} holds nothing")
            rows += [(class_index, class_id, *member) for member in members if member.filename not in _SKIPPED]
        self._extra.mkdir(parents=True, exist_ok=True)
        np.save(self._extra / _ENTRIES, _as_entries(rows))
        np.save(self._extra / _CLASS_IDS, np.array(class_ids))
        for name in ("_entries", "_class_ids"):  # read anew what has just changed
            self.__dict__.pop(name, None)


def _members_from_log(path: Path) -> Iterator[_Member]:
    """Lines `block <k>: <file>`, in order; a file reaches to the next line's block, the last line marks the end."""
    lines = [_LOG_LINE.fullmatch(line.strip()) for line in read_text(path).splitlines() if line.strip()]
    if not lines or None in lines or lines[-1].group(2) != _LOG_END:  # type: ignore[union-attr]
        raise ValueError(f"ImageNet22k: {path} must hold lines 'block <number>: <file>', the last one '{_LOG_END}'")
    offsets = [int(line.group(1)) * _BLOCK for line in lines]  # type: ignore[union-attr]
    for start, end, line in zip(offsets, offsets[1:], lines, strict=False):
        yield _Member(start, end, line.group(2))  # type: ignore[union-attr]


def _members_from_archive(path: Path) -> Iterator[_Member]:
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile():
                    # Not `member.offset`: a long name has blocks of its own before the header.
                    end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                    yield _Member(member.offset_data - _BLOCK, end, member.name)
            require_the_end_of_the_archive(archive)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise ValueError(f"ImageNet22k: {path} is not an uncompressed tar archive, or is damaged: {error}") from error


def _as_entries(rows: list[tuple[int, str, int, int, str]]) -> np.ndarray:
    """Structured array, strings as wide as the longest one; 64-bit offsets only where an archive exceeds 4 GiB."""
    id_width, name_width = (max((len(str(row[i])) for row in rows), default=0) for i in (1, 4))
    offset = "<u4" if all(row[3] < 2**32 for row in rows) else "<u8"
    dtype = [
        ("class_index", "<u4"),
        ("class_id", f"U{id_width}"),
        ("start_offset", offset),
        ("end_offset", offset),
        ("filename", f"U{name_width}"),
    ]
    return np.array(rows, dtype=dtype)
