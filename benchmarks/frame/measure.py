"""Time of several functions taken in turns, and the highest memory of one in a process of its own."""

import ctypes
import gc
import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import torch

Call = Callable[[], object]
Maker = Callable[[], Call]
"""Builds what is needed and returns the function to measure."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def time_in_turns(
    calls: Mapping[str, Call],
    *,
    device: torch.device,
    seconds: float,
    rounds: tuple[int, int],
    before: Callable[[int], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call in each round.

    Every round runs all of them once, every other round in the opposite order, so that a change of the machine's load
    meets all alike. One round more, before the others, is not counted.

    Args:
        calls: what to run.
        device: is waited for before and after each call.
        seconds: to spend on each call; rounds go on until all have had that.
        rounds: fewest and most of them.
        before: gets the number of the round, before each call: to give all the same random numbers.
        clock: `time.process_time` counts the processor's seconds of all threads of this process.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent, index = 0.0, -1
    while index < rounds[0] or (index < rounds[1] and spent < seconds * len(calls)):
        for name in list(calls)[:: 1 if index % 2 == 0 else -1]:
            if before is not None:
                before(index)
            synchronize(device)
            start = clock()
            calls[name]()
            synchronize(device)
            if index >= 0:
                times[name].append(clock() - start)
                spent += times[name][-1]
        index += 1
    return times


def peak_memory(maker: Maker, device: torch.device, threads: int) -> int:
    """Bytes that a call takes at most beyond what is held before it, in a fresh process, the second time it runs.

    On the CPU that is resident memory of the process, on an accelerator what torch has allocated there. `maker` must be
    importable from the new process: a function of a module, or a `functools.partial` of one.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_memory_here, maker, device, threads).result()


def _peak_memory_here(maker: Maker, device: torch.device, threads: int) -> int:
    torch.set_num_threads(threads)
    call = maker()
    call()
    if device.type != "cpu":
        synchronize(device)
        torch.accelerator.reset_peak_memory_stats()
        start = torch.accelerator.memory_allocated()
        call()
        synchronize(device)
        return torch.accelerator.max_memory_allocated() - start
    with PeakMemory() as memory:
        call()
    return memory.bytes


class PeakMemory:
    """The highest resident size of this process while a block runs, beyond that at its start [bytes].

    Linux keeps that mark itself; elsewhere a thread looks every few milliseconds.
    """

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        with suppress(OSError, AttributeError):  # glibc only: pages that malloc keeps for later do not count
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._start = self._peak = resident_memory()
        self._marks = _reset_high_water_mark()
        self._running = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()
        if self._marks:
            self._peak = _status("VmHWM")
        self.bytes = max(self._peak - self._start, 0)

    def _watch(self) -> None:
        while self._running and not self._marks:
            self._peak = max(self._peak, resident_memory())
            time.sleep(0.005)


def resident_memory() -> int:
    """Bytes of this process that are in memory now (where the system does not say: at most so far)."""
    if Path("/proc/self/status").exists():
        return _status("VmRSS")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
