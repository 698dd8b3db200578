"""A job of four processes, of which one dies or stalls, or all are asked to stop, each at another time."""

import os
import random
import re
import signal
from pathlib import Path

import pytest

from dinov3.distributed.stopping import PEER_LOST, PREEMPTED
from tests.faults.figures import fault
from tests.faults.jobs import Training, pause

if os.name != "posix":
    pytest.skip("needs POSIX signals", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

WORLD = 4
SHORT = ("optim.epochs=20", "checkpointing.period=3", "evaluation.eval_period_iterations=50")
STALL_TIMEOUT_S = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Training:
    job = Training(folder, "undisturbed", *SHORT, world_size=WORLD)
    job.run_to_the_end()
    return job


def test_the_others_name_the_rank_that_is_gone_and_the_job_goes_on(folder: Path, undisturbed: Training) -> None:
    flags = ("--stall-timeout", str(STALL_TIMEOUT_S))
    job, rng = Training(folder, "gone", *SHORT, world_size=WORLD, flags=flags), random.Random(7)
    for i in range(12):
        stalls, culprit = i % 3 == 2, rng.randrange(WORLD)
        job.start()
        pause(rng, 1.0)
        said = [len(job.printed(rank)) for rank in range(WORLD)]
        os.kill(job.processes[culprit].pid or 0, signal.SIGSTOP if stalls else signal.SIGKILL)
        fault("one rank of four " + ("stalled" if stalls else "killed"))
        codes = job.join(without=[culprit] if stalls else [])
        job.kill()
        what = "is silent" if stalls else "(was killed|is silent|failed)"
        for rank in range(WORLD):
            if rank != culprit:
                assert codes[rank] == PEER_LOST, job.printed(rank)[-3000:]
                assert re.search(rf"gives up.*rank {culprit} {what}", job.printed(rank)[said[rank] :])
    job.run_to_the_end()
    job.assert_equals(undisturbed)


def test_signals_that_come_at_different_times_stop_all_at_the_same_iteration(
    folder: Path, undisturbed: Training
) -> None:
    job, rng = Training(folder, "skewed", *SHORT, world_size=WORLD), random.Random(8)
    for i in range(6):
        signum = (signal.SIGTERM, signal.SIGUSR2)[i % 2]
        job.start()
        pause(rng, 1.0)
        for process in rng.sample(job.processes, rng.randint(1, WORLD)):  # all, some, or one of them
            os.kill(process.pid or 0, signum)
            fault("SIGTERM or SIGUSR2, ranks at different times")
            pause(rng, 0.3)
        codes = set(job.join())
        # One that is told after the agreement, on its way out, ends by the signal: its state is saved too.
        assert codes <= {PREEMPTED if signum == signal.SIGUSR2 else 128 + signum, -signum}, job.printed()[-3000:]
    job.run_to_the_end()
    job.assert_equals(undisturbed)
