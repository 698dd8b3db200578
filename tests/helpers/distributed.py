"""Running a function in several gloo processes on the CPU."""

import multiprocessing
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# Processes are forked from a server that has imported torch once: a second run costs tenths of a second.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "dinov3.distributed"]
)


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240) -> list[Any]:
    """`fn(*args)` in each of `world_size` processes that form the default group; their results in rank order.

    `fn` must be importable (defined at the top of a module), its arguments and its result picklable (no tensors that
    share memory: return `.tolist()` or NumPy arrays). Warnings are errors there too.

    Raises:
        AssertionError: a process failed (with its traceback) or took longer than `timeout_s`.
    """
    port = _free_port()
    started: list[tuple[Any, Connection]] = []
    for rank in range(world_size):
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(target=_in_process, args=(theirs, fn, args, rank, world_size, port), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    deadline = time.monotonic() + timeout_s
    try:
        results = []
        for rank, (process, connection) in enumerate(started):
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                raise AssertionError(f"rank {rank} of {fn.__name__} did not answer within {timeout_s} s")
            try:
                ok, value = connection.recv()
            except EOFError:
                process.join(5)
                raise AssertionError(f"rank {rank} of {fn.__name__} died with exit code {process.exitcode}") from None
            assert ok, f"rank {rank} of {fn.__name__} failed:\n{value}"
            results.append(value)
        return results
    finally:
        for process, connection in started:
            connection.close()
            process.join(max(0.1, min(10.0, deadline - time.monotonic())))
            if process.is_alive():
                process.kill()


def _in_process(connection: Connection, fn: Callable[..., Any], args: Any, rank: int, world: int, port: int) -> None:
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    import torch

    from dinov3 import distributed

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        distributed.enable()
        answer = (True, fn(*args))
        distributed.disable()
    except BaseException:
        answer = (False, traceback.format_exc())
    connection.send(answer)
    connection.close()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
