"""Leaving early in good order: a signal asks for it, all processes agree on when, the exit code says what happened.

The work itself (a training loop) saves its state between the agreement and the exit, so that the same command goes on
where it stopped.

| exit code | meaning |
| --- | --- |
| 0 | finished |
| 1 | an error; the traceback is in the log |
| 2 | wrong arguments; nothing was started |
| 75 (`PREEMPTED`) | preempted or out of time: the state was saved, the same command goes on |
| 76 (`PEER_LOST`) | another process of the job died or stalled, or a loader; the log names it |
| 130, 143 | stopped by Ctrl-C (SIGINT) or SIGTERM: the state was saved, the same command goes on |
"""

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from dinov3.distributed.torch_distributed_wrapper import get_world_size

logger = logging.getLogger("dinov3")

__all__ = ["PEER_LOST", "PREEMPTED", "StopRequest", "Stopped", "preemption_signal"]

PREEMPTED = 75
PEER_LOST = 76


def preemption_signal() -> signal.Signals | None:
    """The signal that SLURM sends ahead of a preemption or a time limit; None where the platform has no such signal.

    SIGUSR2, or what `SUBMITIT_PREEMPT_SIGNAL` names: the launcher's library reads the same variable.
    """
    name = "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2").removeprefix("SIG")
    found: signal.Signals | None = getattr(signal, name, None)
    return found


class Stopped(SystemExit):
    """The work stopped on a signal, with its state saved; the same command goes on.

    Attributes:
        signum: the signal.
        preempted: whether it announced a preemption or a time limit; the job is to be queued again.
    """

    def __init__(self, signum: int) -> None:
        self.signum = signum
        self.preempted = signum == preemption_signal()
        super().__init__(PREEMPTED if self.preempted else 128 + signum)


class StopRequest:
    """Signals that ask to stop, turned into a decision that all processes take at the same iteration.

        with StopRequest() as stop:
            for ...:
                if stop.agreed():
                    save(...)
                    stop.leave()

    While the context is open, SIGINT, SIGTERM and the preemption signal no longer end the process (a second SIGINT
    does). Outside the main thread it never asks for anything: Python delivers signals to the main thread only.
    """

    def __init__(self) -> None:
        # The later ones win: a scheduler may send SIGTERM first, and the preemption signal is the one to act on.
        self._signals = [s for s in (signal.SIGINT, signal.SIGTERM, preemption_signal()) if s is not None]
        self._noted = 0  # 1 + index of the signal
        self._previous: dict[signal.Signals, Any] = {}
        self._flag: torch.Tensor | None = None
        self._exchange: Any = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._note) for s in self._signals}
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error_type is None:
            self._collect()  # after an error the others may never answer
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self._noted == 1 + self._signals.index(signal.SIGINT):
            raise KeyboardInterrupt
        self._noted = max(self._noted, 1 + self._signals.index(signal.Signals(signum)))
        # Not through the logger: a handler may interrupt it in the middle of a line.
        os.write(2, f"{signal.Signals(signum).name}: stopping after this iteration\n".encode())

    def agreed(self) -> bool:
        """Whether to stop now. Collective over the world: call it once per iteration, in every process.

        With several processes the answer is the one they began to exchange during the call before, so that nobody
        waits for it.
        """
        if get_world_size() == 1:
            return self._noted > 0
        self._collect()
        if self._flag is not None and self._flag.item() > 0:
            return True
        self._flag = torch.tensor(self._noted)  # on the CPU: no device has to be waited for
        self._exchange = dist.all_reduce(self._flag, dist.ReduceOp.MAX, async_op=True)
        return False

    def leave(self) -> None:
        """End the process with the exit code of the signal.

        Raises:
            Stopped: always.
        """
        noted = max(self._noted, 0 if self._flag is None else int(self._flag.item()))
        if noted == 0:
            raise RuntimeError("leave() was called, but nobody asked to stop")
        signum = self._signals[noted - 1]
        stopped = Stopped(signum)
        logger.warning("stopped by %s, exit code %s; the same command goes on from here", signum.name, stopped.code)
        raise stopped

    def _collect(self) -> None:
        if self._exchange is not None:
            self._exchange.wait()
            self._exchange = None
