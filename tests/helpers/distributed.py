"""Run a function on several processes with a gloo group, on this machine's CPU."""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Processes are forked from a server that has imported torch already: the first launch of a test session pays for the
# import (4 to 7 s), later ones take less than a second, and no state or thread of the test process is inherited.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "tests.helpers.distributed"]
)

TIMEOUT_S = 240.0


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    tmp_path: Path,
    *args: Any,
    init_group: bool = True,
    timeout_s: float = TIMEOUT_S,
) -> list[Any]:
    """Call `fn(*args)` on `world_size` processes and return what each of them returned, in rank order.

    Args:
        fn: a function of a module (it is pickled by name); it finds its rank in `torch.distributed`.
        world_size: number of processes.
        tmp_path: folder for the rendezvous and the results.
        args: arguments, pickled.
        init_group: set up the gloo group before the call. Otherwise only the environment variables of a launch by
            torchrun are set, for functions that set up the group themselves.
        timeout_s: for the whole launch.

    Raises:
        RuntimeError: a process failed (with its traceback), died or didn't finish in time. All of them are ended.
    """
    folder = tmp_path / f"run_{time.monotonic_ns()}"
    folder.mkdir(parents=True)
    environment = _launch_environment(world_size, folder.name)
    processes = [
        _CONTEXT.Process(
            target=_run_rank, args=(rank, environment, folder, init_group, timeout_s, fn, args), daemon=True
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        _wait(processes, folder, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [pickle.loads((folder / f"result_{rank}").read_bytes()) for rank in range(world_size)]


def _launch_environment(world_size: int, run_id: str) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RUN_ID": run_id,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }


def _run_rank(
    rank: int,
    environment: dict[str, str],
    folder: Path,
    init_group: bool,
    timeout_s: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        torch.manual_seed(0)
        if init_group:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=int(environment["WORLD_SIZE"]),
                timeout=timedelta(seconds=timeout_s),
            )
        result = pickle.dumps(fn(*args))
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves early must not close connections that others still use
            time.sleep(0.1)  # as in dinov3.distributed.disable(): gloo of torch 2.7 may hang otherwise
            dist.destroy_process_group()
        _write(folder / f"result_{rank}", result)
    except BaseException:  # some errors of torch.distributed are no `Exception`; it is reported by the parent
        _write(folder / f"error_{rank}", traceback.format_exc().encode())
        os._exit(1)  # at once: other ranks are ended by the parent, waiting for their connections could hang


def _write(path: Path, content: bytes) -> None:
    """Write so that a reader sees all of it or nothing."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.rename(path)


def _wait(processes: list[BaseProcess], folder: Path, deadline: float) -> None:
    """Return when all processes have finished; raise as soon as one fails."""
    while True:
        failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if failed:
            time.sleep(0.2)  # the rank that failed first may not be the first whose end is noticed
            raise RuntimeError("\n".join(_report(rank, process, folder) for rank, process in enumerate(processes)))
        if all(process.exitcode == 0 for process in processes):
            return
        if time.monotonic() > deadline:
            alive = [rank for rank, process in enumerate(processes) if process.exitcode is None]
            raise RuntimeError(f"ranks {alive} of {len(processes)} did not finish in time")
        time.sleep(0.02)


def _report(rank: int, process: BaseProcess, folder: Path) -> str:
    error = folder / f"error_{rank}"
    return f"rank {rank} (exit code {process.exitcode}): " + (error.read_text() if error.exists() else "no error")
