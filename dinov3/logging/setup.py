"""Handlers and format of the log: standard output of the main process, and one file per process.

The package logs to the logger `dinov3`; these functions attach handlers, by default to the root logger.
"""

import contextlib
import logging
import sys
from pathlib import Path
from typing import TextIO

from dinov3 import distributed
from dinov3.distributed.environment import launch_rank
from dinov3.logging.progress import bar_hidden

_COLORS = {"D": "\x1b[2m", "I": "\x1b[32m", "W": "\x1b[33m", "E": "\x1b[31m", "C": "\x1b[31;1m"}
_RESET = "\x1b[0m"

_configured: set[str | None] = set()

# Libraries whose debug lines (one per PNG chunk, per font, ...) would bury ours.
_CHATTY = ("PIL", "asyncio", "c10d", "filelock", "fsspec", "matplotlib", "numba", "tensorboard", "torch", "urllib3")


def setup_logging(
    output: str | Path | None = None,
    *,
    name: str | None = None,
    level: int = logging.DEBUG,
    color: bool = True,
    capture_warnings: bool = True,
    log_to_stdout_only_in_main_process: bool = True,
) -> None:
    """Send log records to standard output and, if `output` is given, to a file. Repeating a call adds nothing.

    Args:
        output: a folder, for `<output>/logs/log.txt`, or a file ending in `.txt` or `.log`. It is appended to; ranks
            above 0 add `.rank<r>` to its name.
        name: of the logger; None is the root logger. A named logger doesn't pass its records on to the root.
        level: lowest level that is logged.
        color: colour the prefix of a line if standard output is a terminal.
        capture_warnings: log Python's warnings too.
        log_to_stdout_only_in_main_process: False: every process writes to standard output.

    Raises:
        OSError: the folder or file can't be made or written to.
    """
    _configured.add(name)
    logging.captureWarnings(capture_warnings)
    logger = logging.getLogger(name)
    logger.setLevel(level)
    logger.propagate = name is None
    rank = distributed.get_rank() if distributed.is_enabled() else launch_rank()

    if rank == 0 or not log_to_stdout_only_in_main_process:
        _add_handler(logger, _StdoutHandler(color), level)
    if output is not None and str(output) != "":
        path = _log_file(Path(output), rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        _add_handler(logger, _LogFileHandler(path), level)


def cleanup_logging(*, name: str | None = None) -> None:
    """Remove and close every handler that `setup_logging` attached to the logger `name`."""
    logger = logging.getLogger(name)
    for handler in list(logger.handlers):
        if isinstance(handler, _StdoutHandler | _LogFileHandler):
            logger.removeHandler(handler)
            handler.close()
    logger.propagate = True
    _configured.discard(name)
    if name is None:
        logging.captureWarnings(False)


def configured_loggers() -> list[str | None]:
    """Names of the loggers that `setup_logging` has set up and `cleanup_logging` not yet cleaned."""
    return list(_configured)


def _log_file(output: Path, rank: int) -> Path:
    path = output if output.suffix in (".txt", ".log") else output / "logs" / "log.txt"
    return path.with_name(f"{path.name}.rank{rank}") if rank else path


def _add_handler(logger: logging.Logger, handler: "_StdoutHandler | _LogFileHandler", level: int) -> None:
    for present in logger.handlers:
        if type(present) is type(handler) and present.get_name() == handler.get_name():
            present.setLevel(level)
            handler.close()
            return
    handler.setLevel(level)
    handler.addFilter(_is_wanted)
    logger.addHandler(handler)


def _is_wanted(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG or not record.name.startswith(_CHATTY)


class _Formatter(logging.Formatter):
    """`<L><yyyymmdd hh:mm:ss> <pid> <logger> <file>:<line>] <message>`, L being the first letter of the level."""

    def __init__(self, color: bool = False) -> None:
        prefix = "%(levelname).1s%(asctime)s %(process)s %(name)s %(filename)s:%(lineno)s]"
        super().__init__(f"{prefix} %(message)s", datefmt="%Y%m%d %H:%M:%S")
        self.color = color

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        if not self.color:
            return line
        prefix, _, message = line.partition("] ")
        return f"{_COLORS.get(record.levelname[0], '')}{prefix}]{_RESET} {message}"


class _StdoutHandler(logging.Handler):
    """Writes to whatever `sys.stdout` is at that moment (it may be captured), above a progress bar if one is shown."""

    def __init__(self, color: bool) -> None:
        super().__init__()
        self.set_name("dinov3-stdout")
        self._plain, self._colored = _Formatter(), _Formatter(color)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stream: TextIO = sys.stdout
            formatter = self._colored if stream.isatty() else self._plain
            with bar_hidden():
                stream.write(formatter.format(record) + "\n")
                stream.flush()
        except Exception:
            self.handleError(record)


class _LogFileHandler(logging.FileHandler):
    """Appends to a file; where that is impossible (a full disk) it says so once, on standard error."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, mode="a", encoding="utf-8")
        self.set_name(f"dinov3-file:{self.baseFilename}")
        self.setFormatter(_Formatter())
        self._failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Report an error of `emit`, in whose `except` clause this is called."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            with contextlib.suppress(OSError):
                sys.stderr.write(f"lines of the log are missing from {self.baseFilename}: {error}\n")

    def close(self) -> None:
        """Close the file; what can't be written is lost."""
        with contextlib.suppress(OSError):
            super().close()
