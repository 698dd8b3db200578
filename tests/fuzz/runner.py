"""Many inputs for a reader, in a process of its own: what crashes or hangs it ends that process, and is counted.

Linux only: inputs are timed by an alarm, and the process may not have any amount of memory.
"""

import contextlib
import faulthandler
import json
import logging
import mmap
import multiprocessing
import os
import shutil
import signal
import struct
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.fuzz.core import Reader, WrongResultError, run_one

INPUT_TIMEOUT_S = 20.0
_MAX_MEMORY = 16 << 30  # bytes of address space, most of it code of libraries
_CONTEXT = multiprocessing.get_context("fork")  # a process per slice costs next to nothing
_PROGRESS = struct.Struct("<qqq")  # seed of the current input, inputs taken, inputs refused
_MAX_NOTED = 20


class HangError(BaseException):
    """An input took too long. No `Exception`: readers that catch those must not catch this."""


@dataclass
class Figures:
    """What became of the inputs of a reader so far.

    Attributes:
        next_seed: of the input to go on with.
        taken, refused: inputs with a right result, and with a clear error.
        crashes, hangs, wrong: inputs with another error or the end of the process, without an end, and with a wrong
            result or an unclear error.
        seconds: of all inputs.
        noted: the first of those that failed.
    """

    next_seed: int = 0
    taken: int = 0
    refused: int = 0
    crashes: int = 0
    hangs: int = 0
    wrong: int = 0
    seconds: float = 0.0
    noted: list[dict[str, object]] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        """All of them."""
        return self.taken + self.refused + self.failed

    @property
    def failed(self) -> int:
        """Inputs with which something is wrong."""
        return self.crashes + self.hangs + self.wrong

    def note(self, kind: str, seed: int, message: str) -> None:
        """Count an input that failed."""
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.noted) < _MAX_NOTED:
            shown = message if len(message) <= 3000 else f"{message[:1500]}\n[…]\n{message[-1500:]}"
            self.noted.append({"kind": kind, "seed": seed, "message": shown})


def run_slice(
    kind: type[Reader], figures: Figures, n: int, *, seconds: float = float("inf"), timeout_s: float = INPUT_TIMEOUT_S
) -> None:
    """Give a reader `n` more inputs (fewer if time is over), and add to its figures."""
    last, deadline = figures.next_seed + n, time.monotonic() + seconds
    while figures.next_seed < last and time.monotonic() < deadline:
        _run_until_it_dies(kind, figures, last, deadline, timeout_s)


def _run_until_it_dies(kind: type[Reader], figures: Figures, last: int, deadline: float, timeout_s: float) -> None:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        (folder / "progress").write_bytes(_PROGRESS.pack(figures.next_seed, 0, 0))
        started = time.monotonic()
        process = _CONTEXT.Process(target=_work, args=(kind, folder, figures.next_seed, last, deadline, timeout_s))
        process.start()
        hangs = _wait(process, folder / "progress", 3 * timeout_s)
        seed, taken, refused = _PROGRESS.unpack((folder / "progress").read_bytes())
        figures.seconds += time.monotonic() - started
        figures.taken, figures.refused, figures.next_seed = figures.taken + taken, figures.refused + refused, seed
        for line in (folder / "failures").read_text().splitlines() if (folder / "failures").exists() else ():
            figures.note(**json.loads(line))
        if hangs or process.exitcode:
            printed = (folder / "printed").read_text(errors="replace") if (folder / "printed").exists() else ""
            figures.note("hangs" if hangs else "crashes", seed, f"exit code {process.exitcode}: {printed}")
            figures.next_seed = seed + 1


def _wait(process: multiprocessing.process.BaseProcess, progress: Path, timeout_s: float) -> bool:
    """Whether a process got stuck, and was killed."""
    seen, since = b"", time.monotonic()
    while process.is_alive():
        process.join(0.2)
        now = progress.read_bytes()
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > timeout_s:
            process.kill()
            process.join()
            return True
    return False


def _work(kind: type[Reader], folder: Path, first: int, last: int, deadline: float, timeout_s: float) -> None:
    import resource

    # What libraries print themselves, and the stack if the process crashes.
    printed = os.open(folder / "printed", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    faulthandler.enable(printed)
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    home = folder / "home"
    home.mkdir()
    reader = kind(home)
    taken = refused = 0
    with open(folder / "progress", "r+b") as file, mmap.mmap(file.fileno(), 0) as progress:
        for seed in range(first, last):
            progress[:] = _PROGRESS.pack(seed, taken, refused)
            if seed % 64 == 0:
                os.truncate(printed, 0)
                if time.monotonic() > deadline:
                    return
            try:
                with alarm(timeout_s):
                    accepted = run_one(reader, seed)
            except BaseException as error:
                what = "hangs" if isinstance(error, HangError) else "crashes"
                what = "wrong" if isinstance(error, WrongResultError) else what
                with open(folder / "failures", "a") as failures:
                    message = traceback.format_exc()
                    failures.write(json.dumps({"kind": what, "seed": seed, "message": message}) + "\n")
            else:
                taken, refused = taken + accepted, refused + (not accepted)
        progress[:] = _PROGRESS.pack(last, taken, refused)


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `HangError` if what is inside takes longer."""

    def ring(signum: int, frame: object) -> None:
        raise HangError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class State:
    """The figures of all readers in a file, to go on from.

    Args:
        path: the file; None: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.figures: dict[str, Figures] = {}
        if path is not None and path.exists():
            self.figures = {name: Figures(**values) for name, values in json.loads(path.read_text()).items()}

    def of(self, name: str) -> Figures:
        """The figures of a reader."""
        return self.figures.setdefault(name, Figures())

    def save(self) -> None:
        """Write the file."""
        if self.path is not None:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps({name: asdict(one) for name, one in self.figures.items()}, indent=1))
            shutil.move(partial, self.path)

    def report(self) -> list[str]:
        """Lines of a Markdown table, and of all that failed."""
        head = ("inputs", "right result", "clear error", "crashes", "hangs", "wrong")
        lines = [f"| reader | {' | '.join(head)} |", "|---" * 7 + "|"]
        total = [0] * len(head)
        for name, one in sorted(self.figures.items()):
            row = [one.inputs, one.taken, one.refused, one.crashes, one.hangs, one.wrong]
            lines.append(f"| {name} | " + " | ".join(f"{n:,}" for n in row) + " |")
            total = [a + b for a, b in zip(total, row, strict=True)]
        lines.append("| all | " + " | ".join(f"{n:,}" for n in total) + " |")
        for name, one in self.figures.items():
            lines += [f"{name}, seed {n['seed']} ({n['kind']}):\n{n['message']}" for n in one.noted]
        return lines
