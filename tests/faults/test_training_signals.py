"""Signals that ask to stop, repeated and mixed, at any moment: the job saves, leaves, and goes on where it was."""

import os
import random
import signal
from pathlib import Path

import pytest

from dinov3.distributed.stopping import PREEMPTED
from tests.faults.figures import fault
from tests.faults.jobs import LENGTH, Training, pause

if os.name != "posix":
    pytest.skip("needs POSIX signals", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

N_STOPS = 30
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


def test_repeated_and_mixed_signals_lose_no_iteration(undisturbed: Training, tmp_path: Path) -> None:
    job = Training(tmp_path, "stopped", LENGTH, "checkpointing.period=100000")  # only the signals ask for checkpoints
    rng, saved = random.Random(1), -1
    for i in range(N_STOPS):
        if job.processes and job.processes[0].exitcode == 0:
            saved = -1
        job.begin_anew_if_finished(undisturbed)
        trains = i % 5 > 0
        job.start(until_it_trains=trains)  # every fifth time while it is being set up
        pause(rng, 0.3 if trains else 1.5)
        for _ in range(rng.randint(1, 4)):
            job.signal(rng.choice(SIGNALS))
            fault("SIGTERM or SIGUSR2")
            pause(rng, 0.05)
        (code,) = job.join()
        # Before the loop and after it a signal ends the process as usual: then there is nothing to save.
        assert code in (0, PREEMPTED, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGUSR2), job.printed()[-3000:]
        newest = job.newest()
        reached = -1 if newest is None else int(newest.name)
        assert reached >= saved
        saved = reached
    assert saved > 0
    job.finish(undisturbed)
