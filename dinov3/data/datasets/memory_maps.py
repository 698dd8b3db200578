"""Files that are read in place, a few bytes here and there."""

import mmap
from collections import OrderedDict
from pathlib import Path
from typing import Any


class MemoryMaps:
    """Memory maps of the files used last. What falls out is closed; a copy for another process starts empty.

    Args:
        size: files kept open at most.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"mmap_cache_size must be at least 1, got {size}")
        self._size = size
        self._maps: OrderedDict[Path, mmap.mmap] = OrderedDict()

    def __getitem__(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if len(self._maps) > self._size:
                self._maps.popitem(last=False)[1].close()
        self._maps.move_to_end(path)
        return self._maps[path]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": OrderedDict()}
