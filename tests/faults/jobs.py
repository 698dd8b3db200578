"""Jobs in processes of their own, to be disturbed: started in a second from a process that has imported everything."""

import contextlib
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.faults import figures
from tests.helpers import tiny_training
from tests.helpers.distributed import _launch_environment
from tests.train.test_end_to_end import assert_same_training

TIMEOUT_S = 600.0
LENGTH = "optim.epochs=120"  # 600 iterations
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["tests.helpers.tiny_training", "dinov3.eval.linear", "dinov3.eval.knn", "dinov3.run.export"]
)


def start(main: Callable[[list[str]], object], argv: list[str], output: Path, **environment: str) -> BaseProcess:
    """Call `main(argv)` in a process; what it prints is appended to the file `output`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    process = _CONTEXT.Process(target=_call, args=(main, argv, str(output), environment))
    process.start()
    return process


def _call(main: Callable[[list[str]], object], argv: list[str], output: str, environment: dict[str, str]) -> None:
    import torch

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a process started by a shell
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    result = main(argv)
    sys.exit(result if isinstance(result, int) else 0)


class Training:
    """A tiny training that is started again and again.

    Args:
        folder: for the images, the configuration, what processes print, and the output folders.
        name: of its output folder.
        overrides: of the configuration.
        world_size: number of processes; more than one are a job as torchrun starts it.
        flags: further options of the training script.
    """

    def __init__(
        self, folder: Path, name: str, *overrides: str, world_size: int = 1, flags: Sequence[str] = ()
    ) -> None:
        self.output_dir = folder / name
        self.world_size = world_size
        self.argv = [*flags, *tiny_training.with_output(tiny_training.prepare(folder), self.output_dir, *overrides)]
        self.processes: list[BaseProcess] = []
        # beside a small disk that is filled, never on it: what the job says of the full disk would be lost
        self._printed = [folder / f"{name.replace('/', '_')}_rank{rank}.txt" for rank in range(world_size)]

    def start(self, until_it_trains: bool = True) -> None:
        """Start all processes; return when the data set has been opened, right before the first iteration."""
        seen = [self._n_openings(rank) for rank in range(self.world_size)]
        environment = _launch_environment(self.world_size, "faults") if self.world_size > 1 else {}
        with figures.start_of_a_job() if until_it_trains else contextlib.nullcontext():
            self.processes = [
                start(tiny_training.main, self.argv, printed, **environment, **ranks_of(rank, self.world_size))
                for rank, printed in enumerate(self._printed)
            ]
            while until_it_trains and self.is_alive() and self._n_openings(0) <= seen[0]:
                time.sleep(0.005)

    def is_alive(self) -> bool:
        """Whether all processes are there."""
        return all(process.is_alive() for process in self.processes)

    def kill(self, kind: str | None = None) -> None:
        """End all processes at once, as a node that loses its power; a fault of this kind if they were alive."""
        if kind is not None and self.is_alive():
            figures.fault(kind)
        for process in self.processes:
            process.kill()
        self.join()

    def signal(self, signum: int) -> None:
        """Send a signal to all processes."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, signum)

    def join(self, *, without: Sequence[int] = ()) -> list[int | None]:
        """Exit codes, when all processes have ended (those of the ranks `without` are not waited for)."""
        deadline = time.monotonic() + TIMEOUT_S
        for rank, process in enumerate(self.processes):
            if rank not in without:
                process.join(max(deadline - time.monotonic(), 0))
                assert not process.is_alive(), f"rank {rank} hangs:\n{self.printed(rank)[-3000:]}"
        return [process.exitcode for process in self.processes]

    def run_to_the_end(self) -> None:
        """Start once more and let it finish."""
        self.start(until_it_trains=False)
        codes = self.join()
        assert codes == [0] * self.world_size, f"{codes}:\n{self.printed(0)[-3000:]}"

    def printed(self, rank: int = 0) -> str:
        """All that a rank has printed so far, over all starts."""
        return self._printed[rank].read_text() if self._printed[rank].exists() else ""

    def _n_openings(self, rank: int) -> int:
        return self.printed(rank).count("ImageFolder: ")

    def newest(self) -> Path | None:
        """The newest checkpoint folder, whatever its state."""
        found = [path for path in (self.output_dir / "ckpt").glob("*") if path.name.isdigit()]
        return max(found, key=lambda path: int(path.name), default=None)

    def begin_anew_if_finished(self, undisturbed: "Training") -> None:
        """On a fast machine a training may be over before all faults have been injected: compare it, start another."""
        if self.processes and {process.exitcode for process in self.processes} == {0}:
            self.assert_equals(undisturbed)
            for entry in self.output_dir.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            self.processes = []

    def finish(self, undisturbed: "Training") -> None:
        """Let it run to its end, and compare."""
        self.run_to_the_end()
        self.assert_equals(undisturbed)

    def assert_equals(self, undisturbed: "Training") -> None:
        """Final weights and all metric rows are those of the other, bit for bit."""
        assert_same_training(self.output_dir, undisturbed.output_dir)


def ranks_of(rank: int, world_size: int) -> dict[str, str]:
    """The environment variables in which the processes of a job differ."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}


def pause(rng: random.Random, at_most_s: float) -> None:
    """Wait for a random time."""
    time.sleep(rng.uniform(0.0, at_most_s))


DAMAGES = ("cut off", "without index", "empty index", "cut off index", "file missing", "empty", "rubbish", "removed")


def damage(checkpoint: Path, how: str) -> None:
    """Leave a checkpoint as a file system may after a crash."""
    data, index = next(checkpoint.glob("*.distcp")), checkpoint / ".metadata"
    if how == "cut off":
        os.truncate(data, data.stat().st_size // 2)
    elif how == "without index":
        index.rename(checkpoint / ".metadata.tmp")
    elif how == "empty index":
        os.truncate(index, 0)
    elif how == "cut off index":
        os.truncate(index, index.stat().st_size // 2)
    elif how == "file missing":
        data.unlink()
    elif how == "empty":
        data.unlink()
        index.unlink()
    elif how == "rubbish":
        index.write_bytes(b"\0" * index.stat().st_size)
    else:
        shutil.rmtree(checkpoint)
