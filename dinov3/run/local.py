"""The local launcher: one process per accelerator of this machine (one on a CPU), watched until all have ended.

Processes find their ranks in the variables that torchrun would have set. When one fails, the others are ended, and the
launcher says which one it was and exits with its code.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dinov3.distributed.stopping import PEER_LOST, PREEMPTED, preemption_signal

logger = logging.getLogger("dinov3")

_POLL_S = 0.1
# After the first failure: until the others have ended by themselves, and until they have ended when asked to.
_GRACE_S, _TERM_S = 15.0, 5.0
_TAIL_LINES = 20


def local_job_id() -> str:
    """What `%j` stands for outside of SLURM: the time, and the number of this process."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"


def check_n_processes(asked: int | None) -> int:
    """The number of processes to start: `asked`, or one per visible accelerator, or one.

    Raises:
        ValueError: more than there are accelerators, or CPU cores where there is no accelerator.
    """
    import torch

    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if asked is None:
        return max(1, devices)
    available, what = (devices, "visible accelerators") if devices else (_cpu_cores(), "CPU cores, no accelerator")
    if not 1 <= asked <= available:
        raise ValueError(f"--ngpus {asked}: expected 1 to {available}, this machine has {available} {what}")
    return asked


def run_local(module_path: str, callable_name: str, args: Sequence[str], output_dir: Path, n_processes: int) -> int:
    """Run a script's function in processes of this machine; returns the exit code, see `dinov3.distributed.stopping`.

    Rank 0 writes to this process's standard output and error, the others to `<output_dir>/logs/output.rank<r>.txt`.
    SIGINT, SIGTERM and the preemption signal are passed on to all processes.
    """
    outputs = [output_dir / "logs" / f"output.rank{rank}.txt" for rank in range(n_processes)]
    outputs[0].parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-u", "-m", "dinov3.run.worker", module_path, callable_name, str(output_dir), *args]
    common = {
        "TORCHELASTIC_RUN_ID": local_job_id(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(n_processes),
        "LOCAL_WORLD_SIZE": str(n_processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, _cpu_cores() // n_processes))),
    }
    with contextlib.ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []
        stack.enter_context(_signals_passed_on(processes))
        for rank, output in enumerate(outputs):
            sink: Any = None if rank == 0 else stack.enter_context(output.open("ab"))
            process = subprocess.Popen(
                command,
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,  # its end tells the process that the launcher is gone
                stdout=sink,
                stderr=sink,
                start_new_session=True,  # a Ctrl-C reaches the launcher alone, which passes it on once
            )
            processes.append(stack.enter_context(_ended_on_exit(process)))
        codes = _wait(processes)
    return _report(codes, processes, outputs)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes (negative: the signal that killed it), once all have ended; a failure ends the others."""
    deadline, sent = float("inf"), signal.SIGTERM
    own_doing: set[int] = set()
    while (codes := [process.poll() for process in processes]) and None in codes:
        if deadline == float("inf") and any(codes):
            deadline = time.monotonic() + _GRACE_S
        if time.monotonic() > deadline:
            for rank, process in enumerate(processes):
                if process.poll() is None:
                    process.send_signal(sent)
                    own_doing.add(rank)
            deadline, sent = time.monotonic() + _TERM_S, getattr(signal, "SIGKILL", signal.SIGTERM)
        time.sleep(_POLL_S)
    # Those that the launcher had to end have failed as a consequence, like those that noticed the failure themselves.
    return [PEER_LOST if rank in own_doing else code or 0 for rank, code in enumerate(codes)]


def _report(codes: Sequence[int], processes: Sequence[subprocess.Popen[bytes]], outputs: Sequence[Path]) -> int:
    """Log which rank was the first to fail, and return its exit code."""
    rank = max(range(len(codes)), key=lambda rank: _is_cause(codes[rank]))
    code = codes[rank]
    if code in (0, PREEMPTED, 128 + signal.SIGINT, 128 + signal.SIGTERM):
        return code
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    logger.error("rank %d of %d (process %d) %s", rank, len(codes), processes[rank].pid, how)
    if rank > 0 and (lines := outputs[rank].read_text(errors="replace").splitlines()[-_TAIL_LINES:]):
        logger.error("the end of %s:\n%s", outputs[rank], "\n".join(lines))
    return 128 - code if code < 0 else code


def _is_cause(code: int) -> int:
    """How likely a process with this exit code is the reason why others failed."""
    if code < 0:
        return 4
    return {0: 0, PREEMPTED: 2, PEER_LOST: 1}.get(code, 3)


@contextlib.contextmanager
def _signals_passed_on(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def pass_on(signum: int, _: Any) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signum)

    signals = [s for s in (signal.SIGINT, signal.SIGTERM, preemption_signal()) if s is not None]
    previous = {s: signal.signal(s, pass_on) for s in signals}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _ended_on_exit(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Nothing outlives the launcher, whatever happens in it."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _cpu_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
