"""Lists of many strings that worker processes share."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackedStrings:
    """Strings in one byte string: forked workers share its memory, which reference counts of a list would not allow.

    Attributes:
        joined: all strings, one after another, as bytes of the file system.
        ends: where each ends in `joined`, int64 [n].
    """

    joined: bytes
    ends: np.ndarray

    @classmethod
    def pack(cls, strings: Iterable[str | bytes]) -> "PackedStrings":
        """The strings, in their order."""
        encoded = [os.fsencode(string) for string in strings]
        return cls(b"".join(encoded), np.cumsum([len(part) for part in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.joined[start : int(self.ends[index])])

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))
