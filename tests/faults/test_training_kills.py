"""A training that is killed again and again, its checkpoints damaged in between, ends as one that nobody disturbed."""

import random
import time
from pathlib import Path

import pytest

from tests.faults.figures import fault
from tests.faults.jobs import DAMAGES, LENGTH, Training, damage, pause

N_KILLS = 60

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


def test_kills_at_random_moments_and_damaged_checkpoints_lose_nothing(undisturbed: Training, tmp_path: Path) -> None:
    job = Training(tmp_path, "killed", LENGTH, "checkpointing.period=3", "evaluation.eval_period_iterations=100")
    rng, during_a_save, damaged = random.Random(0), 0, 0
    for i in range(N_KILLS):
        job.begin_anew_if_finished(undisturbed)
        job.start()
        if i % 3 == 0:  # in the middle of a save
            while job.is_alive() and not list((job.output_dir / "ckpt").glob(".saving-*")):
                time.sleep(0.0005)
        else:
            pause(rng, 0.6)
        job.kill("training killed")
        during_a_save += bool(list((job.output_dir / "ckpt").glob(".saving-*")))
        if i % 3 == 1 and (newest := job.newest()) is not None:
            how = DAMAGES[damaged % len(DAMAGES)]
            damage(newest, how)
            fault(f"newest checkpoint {how}")
            damaged += 1
            said = len(job.printed())
            job.start()
            job.kill("training killed")
            if how != "removed":
                assert f"skipping the checkpoint {newest}: " in job.printed()[said:]
    job.finish(undisturbed)
    assert during_a_save >= N_KILLS // 6, "too few kills hit a save"
    assert damaged >= 2 * len(DAMAGES)
