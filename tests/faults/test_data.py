"""File systems that give errors or don't answer, and loader workers that die."""

import contextlib
import itertools
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov3.distributed.stopping import PEER_LOST
from tests.faults.figures import fault
from tests.faults.jobs import LENGTH, Training, pause
from tests.helpers.processes import children_of, is_running

if not Path("/proc/self/mem").exists():
    pytest.skip("needs Linux", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

OVERRIDES = (LENGTH, "checkpointing.period=10", "evaluation.eval_period_iterations=50")


def pictures(folder: Path) -> list[Path]:
    return sorted((folder / "images").rglob("*.png"))


@contextlib.contextmanager
def replaced(picture: Path, by: str) -> Iterator[None]:
    """Another file in the place of a picture."""
    aside, other = picture.with_suffix(".aside"), picture.with_suffix(".other")
    if by == "read error":  # the kernel answers EIO
        other.symlink_to("/proc/self/mem")
    else:  # opening a pipe that nobody writes to never returns
        os.mkfifo(other)
    os.link(picture, aside)
    other.replace(picture)
    try:
        yield
    finally:
        aside.replace(picture)


def test_read_errors_that_pass_change_nothing(undisturbed: Training, tmp_path: Path) -> None:
    rng = random.Random(4)
    for n_workers in (0, 2):
        job = Training(tmp_path, f"errors_{n_workers}", *OVERRIDES, f"train.num_workers={n_workers}")
        job.start()
        # One after the other: none fails again before the last of the tries to read it.
        for picture in itertools.cycle(pictures(tmp_path)):
            if not job.is_alive():
                break
            with replaced(picture, by="read error"):
                fault("read error (EIO)")
                pause(rng, 0.2)
            pause(rng, 0.5)
        assert job.join() == [0], job.printed()[-3000:]
        assert not (job.output_dir / "skipped_files.jsonl").exists()
        job.assert_equals(undisturbed)


def test_a_file_system_that_does_not_answer_ends_the_job_with_a_message(undisturbed: Training, tmp_path: Path) -> None:
    rng, job = random.Random(5), Training(tmp_path, "hanging", *OVERRIDES, flags=("--stall-timeout", "5"))
    for i in range(8):
        job.argv = [word for word in job.argv if "num_workers" not in word] + [f"train.num_workers={i % 2}"]
        job.begin_anew_if_finished(undisturbed)
        job.start()
        pause(rng, 0.5)
        said = len(job.printed())
        with replaced(rng.choice(pictures(tmp_path)), by="pipe"):
            fault("read that never returns" + (" in a worker" if i % 2 else ""))
            workers = children_of(job.processes[0].pid)
            assert job.join() == [PEER_LOST]
        assert "no progress for 5 s while loading the batch of iteration" in job.printed()[said:]
        time.sleep(0.5)
        assert not any(is_running(worker) for worker in workers), "a worker was left behind"
    job.finish(undisturbed)


def test_workers_that_die_end_the_job_with_a_message(undisturbed: Training, tmp_path: Path) -> None:
    rng, job = random.Random(6), Training(tmp_path, "worker", *OVERRIDES, "train.num_workers=2")
    for _ in range(12):
        job.begin_anew_if_finished(undisturbed)
        job.start()
        pause(rng, 0.5)
        said = len(job.printed())
        while job.is_alive() and len(children_of(job.processes[0].pid)) < 2:
            time.sleep(0.005)
        worker = rng.choice(children_of(job.processes[0].pid))
        os.kill(worker, signal.SIGKILL)
        fault("loader worker killed")
        assert job.join() == [1]
        said_why = (f"DataLoader worker (pid {worker}) is killed by signal: Killed", "a worker of the data loader died")
        assert any(why in job.printed()[said:] for why in said_why), job.printed()[said:][-3000:]
    job.finish(undisturbed)
