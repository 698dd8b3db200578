"""A training that is killed again and again ends as one that nobody disturbed."""

import logging
import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest

from dinov3.train.train import main
from tests.helpers import tiny_training
from tests.helpers.tiny_training import with_output
from tests.train.test_end_to_end import assert_same_training

N_KILLS = 30
LONG = ("optim.epochs=160", "checkpointing.period=3", "evaluation.eval_period_iterations=100")  # 800 iterations

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def start(argv: list[str]) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.tiny_training"])
    process = context.Process(target=main, args=(argv,))
    process.start()
    return process


def size_of_log(output_dir: Path) -> int:
    log = output_dir / "logs" / "log.txt"
    return log.stat().st_size if log.exists() else 0


def test_thirty_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    arguments = tiny_training.prepare(tmp_path)
    main(with_output(arguments, tmp_path / "undisturbed", *LONG))
    rng, output_dir = random.Random(0), tmp_path / "killed"
    argv = with_output(arguments, output_dir, *LONG)
    killed = during_saving = 0
    while killed < N_KILLS:
        before = size_of_log(output_dir)
        process = start(argv)
        while size_of_log(output_dir) <= before + 4000 and process.is_alive():  # past the set-up
            time.sleep(0.005)
        if killed % 3 == 0:  # every third time in the middle of a save
            while process.is_alive() and not list((output_dir / "ckpt").glob(".saving-*")):
                time.sleep(0.0005)
        else:
            time.sleep(rng.uniform(0.0, 1.0))
        assert process.is_alive(), f"the training ended after {killed} kills: make it longer"
        process.kill()
        process.join()
        during_saving += bool(list((output_dir / "ckpt").glob(".saving-*")))
        killed += 1
    main(argv)
    assert_same_training(output_dir, tmp_path / "undisturbed")
    assert during_saving >= N_KILLS // 6, "too few kills hit a save"


@pytest.mark.parametrize("damage", ["truncated", "no index", "empty index"])
def test_a_damaged_checkpoint_is_skipped_by_name_and_the_one_before_is_used(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = tiny_training.prepare(tmp_path)
    main(with_output(arguments, tmp_path / "undisturbed"))
    output_dir = tmp_path / "damaged"
    shutil.copytree(tmp_path / "undisturbed", output_dir)
    newest = output_dir / "ckpt" / "14"
    if damage == "truncated":
        data = next(newest.glob("*.distcp"))
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif damage == "no index":
        (newest / ".metadata").unlink()
    else:
        (newest / ".metadata").write_bytes(b"")
    with caplog.at_level(logging.INFO, logger="dinov3"):
        main(with_output(arguments, output_dir))
    assert "ckpt/14" in caplog.text
    assert "Resuming from" in caplog.text
    assert_same_training(output_dir, tmp_path / "undisturbed")
