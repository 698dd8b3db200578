"""Checkpoints that are written while the training goes on."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3.checkpointer import CheckpointSaver, load_checkpoint, saver
from dinov3.checkpointer.dcp import CheckpointError
from tests.checkpointer.toy import build, full_state, train
from tests.helpers.distributed import run_distributed


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, write = threading.Event(), saver.write_checkpoint

    def write_later(*args: Any, **kwargs: Any) -> None:
        may_write.wait()
        write(*args, **kwargs)

    monkeypatch.setattr(saver, "write_checkpoint", write_later)
    arch, optimizer = build(1)
    train(arch, optimizer, 2)
    state = full_state(arch)
    kept: list[Path] = []
    with CheckpointSaver() as checkpoints:
        checkpoints.save(tmp_path / "1", iteration=1, model=arch, optimizer=optimizer, then=kept.append)
        later = train(arch, optimizer, 2, first=2)
        assert not (tmp_path / "1").exists()
        may_write.set()
    assert checkpoints.newest == tmp_path / "1"
    assert kept == [tmp_path / "1"]
    arch, optimizer = build(2)
    assert load_checkpoint(tmp_path / "1", model=arch, optimizer=optimizer) == 1
    assert full_state(arch) == state
    assert train(arch, optimizer, 2, first=2) == later


@pytest.mark.parametrize("in_background", [True, False])
def test_failures_are_logged_and_the_third_in_a_row_is_raised(
    in_background: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arch, _ = build(1)
    checkpoints = CheckpointSaver(in_background=in_background)
    checkpoints.save(tmp_path / "good" / "0", iteration=0, model=arch)
    (tmp_path / "file").write_text("no folder")

    def fail() -> None:
        checkpoints.save(tmp_path / "file" / "1", iteration=1, model=arch)
        checkpoints.wait()

    fail()
    fail()
    assert caplog.text.count("cannot save the checkpoint") == 2
    checkpoints.save(tmp_path / "good" / "2", iteration=2, model=arch)
    checkpoints.wait()
    assert checkpoints.newest == tmp_path / "good" / "2"
    fail()
    fail()
    with pytest.raises(CheckpointError, match=r"cannot save the checkpoint .*3 failures in a row"):
        fail()
    assert load_checkpoint(tmp_path / "good" / "0", model=arch) == 0


def test_after_an_error_of_the_caller_the_checkpoint_is_complete(tmp_path: Path) -> None:
    arch, _ = build(1, width=300)

    def save_and_fail() -> None:
        with CheckpointSaver() as checkpoints:
            checkpoints.save(tmp_path / "0", iteration=0, model=arch)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save_and_fail()
    assert (tmp_path / "0" / ".metadata").exists()


def _train_and_save(folder: Path) -> tuple[list[float], list[float]]:
    """Losses of a sharded training that saves all the time, and of one that doesn't."""
    arch, optimizer = build(1, sharded=True)
    undisturbed = train(arch, optimizer, 8)
    arch, optimizer = build(1, sharded=True)
    losses = []
    with CheckpointSaver() as checkpoints:
        for i in range(8):
            losses += train(arch, optimizer, 1, first=i)
            checkpoints.save(folder / str(i), iteration=i, model=arch, optimizer=optimizer)
    return undisturbed, losses


def _go_on(folder: Path, sharded: bool) -> list[float]:
    arch, optimizer = build(5, sharded=sharded)
    assert load_checkpoint(folder, model=arch, optimizer=optimizer) == 3
    return train(arch, optimizer, 4, first=4)


def test_collectives_of_the_training_and_of_the_save_do_not_mix(tmp_path: Path) -> None:
    for undisturbed, losses in run_distributed(_train_and_save, 2, tmp_path, tmp_path / "ckpt"):
        assert losses == undisturbed
        assert _go_on(tmp_path / "ckpt" / "3", sharded=False) == pytest.approx(losses[4:], rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == [str(i) for i in range(8)]
    assert torch.get_num_threads() == 1


def _fail_on_one_rank(folder: Path) -> str:
    arch, _ = build(1, sharded=True)
    if torch.distributed.get_rank() == 1:
        torch.save = _full_disk
    checkpoints = CheckpointSaver(patience=0)
    checkpoints.save(folder / "0", iteration=0, model=arch)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.wait()
    return str(caught.value)


def _full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_failure_of_one_rank_is_an_error_of_all(tmp_path: Path) -> None:
    messages = run_distributed(_fail_on_one_rank, 2, tmp_path, tmp_path / "ckpt")
    assert all("(rank 1): " in message and "No space left" in message for message in messages), messages
    assert list((tmp_path / "ckpt").iterdir()) == []
