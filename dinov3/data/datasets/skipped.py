"""Samples that can't be read: others take their place, and who they are is written down.

Owns the report: a file of JSON lines to which all worker processes append, and the log line that sums it up.
"""

import json
import logging
import os
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

logger = logging.getLogger("dinov3")

_LOG_PERIOD_S = 600.0
_FIRST_LOG_S = 30.0
_N_SHOWN = 5
_N_SHOWN_WITHOUT_FILE = 200
T = TypeVar("T")


class SkippedFiles:
    """The names of unreadable samples with the reasons, gathered from all processes that hold a copy of this object.

    Args:
        path: file of the report, one JSON object with `file` and `reason` per line. It appears with the first entry;
            entries of an earlier run stay. None: a temporary file that goes with the process.

    Attributes:
        is_temporary: whether it is such a file, of this process and its workers alone.
    """

    is_temporary = False

    def __init__(self, path: str | Path | None = None) -> None:
        if path is None:
            path = Path(tempfile.gettempdir()) / f"dinov3-skipped-{uuid.uuid4().hex}.jsonl"
            self._removal = weakref.finalize(self, _remove, path, os.getpid())
            self.is_temporary = True
        self.path = Path(path)
        self._own: set[str] | None = None

    def move_to(self, path: str | Path) -> None:
        """Write to another file from now on. To be called before workers start."""
        entries = self.read()
        self.path = Path(path)
        self.is_temporary = False
        self._own = None
        for name, reason in entries.items():
            self.add(name, reason)

    def add(self, name: str, reason: str) -> bool:
        """Note a sample; False if it was noted before."""
        if self._own is None:
            self._own = set(self.read())
        if name in self._own:
            return False
        self._own.add(name)
        line = json.dumps({"file": name, "reason": reason}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write to a file opened for appending: lines of several processes don't mix.
            with open(self.path, "ab", buffering=0, opener=_private if self.is_temporary else None) as file:
                file.write(line.encode())
        except OSError as error:  # a full disk is no reason to end
            logger.warning(f"{name} was skipped ({reason}), which {self.path} does not say: {error}")
        return True

    def read(self) -> dict[str, str]:
        """Name -> reason of all samples noted so far, by any process."""
        try:
            lines = self.path.read_text().splitlines()
        except FileNotFoundError:
            return {}
        entries = {}
        for line in lines:
            try:
                entry = json.loads(line)
                entries[entry["file"]] = entry["reason"]
            except (ValueError, KeyError, TypeError):  # the last line of a process that was killed
                logger.warning(f"{self.path}: left out a line that isn't complete: {line[:80]!r}")
        return entries

    def summary(self, already_told: int = 0) -> str | None:
        """What to log; None if there is nothing new since `already_told` entries."""
        entries = self.read()
        if len(entries) <= already_told:
            return None
        limit = _N_SHOWN_WITHOUT_FILE if self.is_temporary else _N_SHOWN
        newest = list(entries.items())[already_told:][:limit]
        shown = "; ".join(f"{name}: {reason}" for name, reason in newest)
        more = ", ..." if len(entries) - already_told > limit else ""
        where = "" if self.is_temporary else f"; {self.path} lists them"
        return f"{len(entries)} images can't be read so far, others take their place{where}. New: {shown}{more}"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_removal"}


class ReportingIterator(Generic[T]):
    """Passes on the batches of a loader, and logs which samples were skipped: now and then, and at the end."""

    def __init__(self, batches: Iterator[T], skipped: SkippedFiles) -> None:
        self._batches = batches
        self._report = _Report(skipped)
        self._at_the_end = weakref.finalize(self, self._report)
        self._due = time.monotonic() + _FIRST_LOG_S

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if time.monotonic() >= self._due:
            self._report()
            self._due = time.monotonic() + _LOG_PERIOD_S
        try:
            return next(self._batches)
        except StopIteration:
            self._report()
            raise

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]


class _Report:
    """Logs what is new since the last call."""

    def __init__(self, skipped: SkippedFiles) -> None:
        self._skipped = skipped
        self._n_told = 0

    def __call__(self) -> None:
        if (text := self._skipped.summary(self._n_told)) is not None:
            logger.warning(text)
            self._n_told = len(self._skipped.read())


def _private(path: str, flags: int) -> int:
    """Open a file that nobody else may read: in a folder that all users share."""
    return os.open(path, flags, 0o600)


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a worker process that got a copy
        path.unlink(missing_ok=True)
