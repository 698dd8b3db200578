"""A progress bar for people who watch: only on a terminal, only in the main process, only if tqdm is installed."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any, Protocol

from dinov3 import distributed


class ProgressBar(Protocol):
    """What a loop needs of a progress bar."""

    def update(self, n: int = 1) -> Any:
        """Move on by `n` iterations."""


class _NoBar:
    def update(self, n: int = 1) -> None:
        pass


_bars_shown = 0


@contextlib.contextmanager
def progress_bar(total: int | None, initial: int = 0, description: str = "") -> Iterator[ProgressBar]:
    """A bar on standard error from `initial` to `total` iterations, or one that shows nothing.

    Args:
        total: None if unknown.
        initial: iterations done before.
        description: stands before the bar.
    """
    global _bars_shown
    if not _somebody_watches():
        yield _NoBar()
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=initial, desc=description, dynamic_ncols=True, leave=False, file=sys.stderr) as bar:
        _bars_shown += 1
        try:
            yield bar
        finally:
            _bars_shown -= 1


@contextlib.contextmanager
def bar_hidden() -> Iterator[None]:
    """Take the bar off the screen while a line is written."""
    if not _bars_shown:
        yield
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stdout):
        yield


def _somebody_watches() -> bool:
    return sys.stderr.isatty() and distributed.is_main_process() and importlib.util.find_spec("tqdm") is not None
