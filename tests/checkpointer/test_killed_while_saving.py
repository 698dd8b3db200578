"""A process that is killed while it saves leaves a checkpoint that can be loaded: the old one or the new one."""

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3.checkpointer import find_latest_checkpoint, keep_last_n_checkpoints, load_checkpoint, save_checkpoint
from tests.checkpointer.toy import build, full_state
from tests.helpers.distributed import run_distributed


def _in_fork(action: Callable[[], None]) -> int:
    """Run `action` in a copy of this process; its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _save_and_die(folder: Path, name: str, n_calls: int) -> None:
    """Save, and be killed just before the `n_calls`-th call that changes the file system."""
    left = n_calls

    def dying(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    arch, _ = build(2)
    for module, functions in {
        os: ("rename", "replace", "mkdir", "fsync", "unlink", "rmdir"),
        torch: ("save",),
        shutil: ("rmtree",),
    }.items():
        for function in functions:
            setattr(module, function, dying(getattr(module, function)))
    save_checkpoint(folder / name, iteration=2, model=arch)
    keep_last_n_checkpoints(folder, 1)


def _die_at_every_moment(root: Path, name: str) -> tuple[int, set[int]]:
    """How many moments there are, and the iterations that could be loaded afterwards."""
    states = {seed: full_state(build(seed)[0]) for seed in (1, 2)}
    seen, n_calls = set(), 0
    while True:
        n_calls += 1
        folder = root / f"{name}_{n_calls}"
        save_checkpoint(folder / "1", iteration=1, model=build(1)[0])
        exit_code = _in_fork(lambda folder=folder, n=n_calls: _save_and_die(folder, name, n))
        assert exit_code in (0, -signal.SIGKILL)
        latest = find_latest_checkpoint(folder)
        assert latest is not None, f"nothing to load after being killed at call {n_calls}"
        arch, _ = build(3)
        iteration = load_checkpoint(latest, model=arch)
        assert full_state(arch) == states[iteration]
        seen.add(iteration)
        save_checkpoint(folder / "3", iteration=3, model=arch)  # the next save works and tidies up
        assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]
        shutil.rmtree(folder)
        if exit_code == 0:
            return n_calls, seen


@pytest.mark.parametrize("name", ["1", "2"], ids=["replacing the same", "a later one"])
def test_killed_at_any_moment(tmp_path: Path, name: str) -> None:
    # In a process of its own: only one without threads may be forked.
    ((n_calls, seen),) = run_distributed(_die_at_every_moment, 1, tmp_path, tmp_path, name, init_group=False)
    assert seen == {1, 2}
    assert n_calls > 8


def _save_on_a_full_disk(folder: Path) -> str:
    arch, _ = build(2, width=300)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # bytes per file
    try:
        save_checkpoint(folder / "2", iteration=2, model=arch)
    except RuntimeError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "saved"


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    ckpt = tmp_path / "ckpt"
    save_checkpoint(ckpt / "1", iteration=1, model=build(1)[0])
    (message,) = run_distributed(_save_on_a_full_disk, 1, tmp_path, ckpt, init_group=False)
    assert "cannot save the checkpoint" in message
    assert [p.name for p in ckpt.iterdir()] == ["1"]
    assert find_latest_checkpoint(ckpt) == ckpt / "1"
