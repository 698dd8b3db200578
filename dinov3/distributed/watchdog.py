"""Who is missing: notice that the processes of a job no longer go on together, say which one is why, and end.

Collectives make every process wait for the slowest. When one dies or hangs, the others only see an operation that fails
or never ends. Here each process keeps a small file with what it is doing; a process that has been waiting for too long,
or whose communication broke, reads the files of the others to find the one that is silent or behind.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from dinov3.distributed.stopping import PEER_LOST
from dinov3.distributed.torch_distributed_wrapper import get_rank, get_world_size

logger = logging.getLogger("dinov3")

__all__ = ["PeerLost", "Watchdog"]

_MAX_TICK_S = 5.0
# What errors of gloo and of sockets say when the other end is gone or silent; NCCL raises a `DistError`.
_COMMUNICATION = re.compile(r"gloo|connection (closed|reset)|broken pipe|timed? ?out|socket", re.IGNORECASE)


class PeerLost(SystemExit):
    """Another process of the job died, failed or stalled; it has been named in the log."""

    def __init__(self) -> None:
        super().__init__(PEER_LOST)


class Watchdog:
    """Ends this process if the job makes no progress, after naming the process that is the reason.

        with Watchdog(folder, timeout_s=1800) as watchdog:
            for ...:
                watchdog.beat("computing iteration 3")

    Opening the context is a collective of the world.

    Args:
        folder: for one file per rank; shared by all nodes. The files are removed after a regular end.
        timeout_s: longest time between two beats that is not a stall.
        alone: watch a job of one process as well (a loader may stall); it writes no file.
    """

    def __init__(self, folder: str | os.PathLike[str], timeout_s: float, *, alone: bool = False) -> None:
        self.folder, self.timeout_s, self._alone = Path(folder), timeout_s, alone
        self._rank, self._world_size = get_rank(), get_world_size()
        self._tick_s = min(_MAX_TICK_S, timeout_s / 5)
        # `gives_up`: it is about to end because of another one. `tick` counts all the time, `beats` only progress.
        self._state: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "failed": None}
        self._state |= {"tick": 0, "beats": 0, "doing": "starting", "gives_up": False}
        self._lock = threading.Lock()
        self._unwritten = False
        self._waited_s = 0.0  # since the last beat; not counting time in which this process was suspended
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._world_size > 1:
            self._write()
            dist.barrier()  # from here on, nobody reads a file that another run has left
        if self._world_size > 1 or self._alone:
            self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End regularly.

        Raises:
            PeerLost: the error is one of communication.
        """
        if isinstance(error, Exception) and self._world_size > 1:
            if _is_communication(error):
                self._report(self._explanation() or "none of the others is silent or has failed", error)
                raise PeerLost from error
            self._state["failed"] = f"{type(error).__name__}: {error}"
            self._write()
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        if not isinstance(error, Exception) and self._world_size > 1:
            self._file(self._rank).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others are still in it
                self.folder.rmdir()

    def beat(self, doing: str) -> None:
        """Note that this process has got on, and with what."""
        self._state["doing"] = doing
        self._state["beats"] = self._state["beats"] + 1
        self._waited_s = 0.0

    # -- In the thread ------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closed.wait(self._tick_s):
            self._write()
            self._waited_s += self._tick_s
            if self._waited_s > self.timeout_s and not self._state["gives_up"]:
                self._report(
                    self._explanation() or "all are alive and in the same place; does a file system not answer?"
                )
                for child in multiprocessing.active_children():  # workers of a loader that hang would stay for ever
                    child.kill()
                os._exit(PEER_LOST)  # the main thread waits for what will never come

    def _write(self) -> None:
        if self._world_size == 1:
            return
        with self._lock:
            self._state["tick"] = self._state["tick"] + 1
            self._state["at"] = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
            partial = self._file(self._rank).with_suffix(".partial")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                partial.write_text(json.dumps(self._state))
                os.replace(partial, self._file(self._rank))
            except OSError as error:  # a full disk is no reason to end, nor to stop watching
                if not self._unwritten:
                    logger.warning("the state of rank %d can't be written: %s", self._rank, error)
                self._unwritten = True
            else:
                self._unwritten = False

    # -- What happened ------------------------------------------------------------------------------------------------

    def _explanation(self) -> str:
        """The ranks that failed or are silent, else those that are behind; empty if there is none. Takes some ticks."""
        if self._world_size == 1:
            return ""
        self._state["gives_up"] = True
        self._write()
        before = self._read_all()
        deadline = time.monotonic() + 2.5 * self._tick_s
        while not (lost := self._surely_lost()) and time.monotonic() < deadline:
            time.sleep(self._tick_s / 10)
            if threading.current_thread() is self._thread:
                self._write()
        after = self._read_all()
        if not lost:
            silent = [r for r, s in after.items() if not s["gives_up"] and s["tick"] == before[r]["tick"]]
            lost = dict.fromkeys(silent, "is silent: killed, suspended, or cut off")
        if not lost:
            fewest = min(state["beats"] for state in after.values())
            behind = [rank for rank, state in after.items() if state["beats"] == fewest]
            if len(behind) < self._world_size:
                lost = dict.fromkeys(behind, "is behind the others, which wait for it")
        return "; ".join(f"rank {rank} {what}; {_describe(after[rank])}" for rank, what in lost.items())

    def _surely_lost(self) -> dict[int, str]:
        """What happened to the ranks that have failed or are known to have ended."""
        lost = {}
        for rank, state in self._read_all().items():
            if state["failed"] is not None:
                lost[rank] = f"failed ({state['failed']})"
            elif _is_gone(state) and not state["gives_up"]:
                lost[rank] = "was killed"
        return lost

    def _read_all(self) -> dict[int, dict[str, Any]]:
        """The states of all ranks; that of one that has ended regularly says so."""
        found = {}
        for rank in range(self._world_size):
            try:
                found[rank] = json.loads(self._file(rank).read_text())
            except OSError:
                found[rank] = self._state | {"failed": "ended before the others", "doing": "leaving"}
        return found

    def _report(self, explanation: str, error: Exception | None = None) -> None:
        why = f"communication failed while {self._state['doing']}"
        if error is None:
            why = f"no progress for {self.timeout_s:g} s while {self._state['doing']}"
        message = f"rank {self._rank} of {self._world_size} gives up: {why}. Reason: {explanation}"
        logger.critical(message, exc_info=error)
        if self._rank != 0:  # whose log goes to standard output
            sys.stderr.write(message + "\n")
        sys.stderr.flush()

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.json"


def _describe(state: Mapping[str, Any]) -> str:
    return f"last seen {state['at']} on {state['host']} (process {state['pid']}) while {state['doing']}"


def _is_gone(state: Mapping[str, Any]) -> bool:
    """Whether the process is known to have ended; False also where that can't be known from here."""
    if state["host"] != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(state["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _is_communication(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _COMMUNICATION.search(str(error)) is not None
    )
