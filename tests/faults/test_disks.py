"""Disks that are full, that refuse to be written, and checkpoint folders that vanish, while a training runs."""

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.figures import fault
from tests.faults.jobs import LENGTH, Training, pause

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

OVERRIDES = (LENGTH, "checkpointing.period=10", "evaluation.eval_period_iterations=50")
N_EPISODES = 12


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Use all space that is left; returns the file to remove."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    return ballast


def test_a_full_disk_loses_nothing(undisturbed: Training, small_disk: Path, tmp_path: Path) -> None:
    job = Training(tmp_path, "disk/out", *OVERRIDES)
    (tmp_path / "disk" / "out").mkdir()
    rng, ended, went_on = random.Random(2), 0, 0
    for i in range(N_EPISODES):
        job.begin_anew_if_finished(undisturbed)
        job.start()
        pause(rng, 0.5)
        said = len(job.printed())
        ballast = fill(small_disk)
        fault("disk full")
        if i % 3 == 0:  # until the training gives up, and started again into the full disk
            (code,) = job.join()
            assert code == 1
            assert "No space left on device" in job.printed()[said:]
            ended += 1
            job.start(until_it_trains=False)
            assert job.join() == [1]
            ballast.unlink()
        else:  # space comes back while it runs, then it is killed
            wait_for(lambda said=said: "No space left" in job.printed()[said:] or not job.is_alive())
            ballast.unlink()
            pause(rng, 0.5)
            went_on += job.is_alive()
            job.kill()
    job.finish(undisturbed)
    assert ended > 0
    assert went_on > 0


def vanish(checkpoints: Path) -> Callable[[], None]:
    """Remove the folder of checkpoints; nothing brings it back."""
    while checkpoints.exists():  # a save may be putting files into it
        shutil.rmtree(checkpoints, ignore_errors=True)
    return lambda: None


def become_a_file(checkpoints: Path) -> Callable[[], None]:
    """Put a file in its place."""
    aside = checkpoints.with_name("aside")
    checkpoints.rename(aside)
    checkpoints.write_text("not a folder")

    def restore() -> None:
        checkpoints.unlink()
        aside.rename(checkpoints)

    return restore


def refuse_to_be_written(checkpoints: Path) -> Callable[[], None]:
    """Make it read-only, for root too where that is possible."""
    if os.geteuid() != 0:
        checkpoints.chmod(0o555)
        return lambda: checkpoints.chmod(0o755)
    if subprocess.run(["chattr", "+i", str(checkpoints)], capture_output=True).returncode != 0:
        pytest.skip("this file system has no folders that root can't write")
    return lambda: subprocess.run(["chattr", "-i", str(checkpoints)], check=True) and None


@pytest.mark.parametrize("break_it", [vanish, become_a_file, refuse_to_be_written])
def test_a_broken_folder_of_checkpoints_loses_nothing(
    break_it: Callable[[Path], Callable[[], None]], undisturbed: Training, tmp_path: Path
) -> None:
    job = Training(tmp_path, "broken", *OVERRIDES)
    rng = random.Random(3)
    for i in range(N_EPISODES // 2):
        job.begin_anew_if_finished(undisturbed)
        job.start()
        wait_for(lambda: job.newest() is not None)
        pause(rng, 0.3)
        said = len(job.printed())
        restore = break_it(job.output_dir / "ckpt")
        fault(f"ckpt/ was made to {break_it.__name__.replace('_', ' ')}")
        try:
            if break_it is vanish:
                wait_for(lambda: job.newest() is not None or not job.is_alive())
            elif i % 2:
                assert job.join() == [1]
                assert "cannot save the checkpoint" in job.printed()[said:]
            else:
                wait_for(lambda said=said: "cannot save the checkpoint" in job.printed()[said:])
        finally:
            restore()
        pause(rng, 0.3)
        job.kill()
    job.finish(undisturbed)


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Return when the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.005)
