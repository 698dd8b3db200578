import builtins
import logging
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinov3 import distributed
from dinov3.configs import exit_job, setup_job
from dinov3.run.init import job_context
from dinov3.utils import fix_random_seeds
from tests.helpers.distributed import run_distributed


def state() -> tuple[Any, ...]:
    ours = [h for h in logging.getLogger().handlers if type(h).__module__.startswith("dinov3")]
    return distributed.is_enabled(), builtins.print, ours, dict(os.environ)


@pytest.fixture(autouse=True)
def _root_level() -> Any:
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


_draws: list[float] = []


def failing_job(folder: Path, attempt: int) -> None:
    with job_context(output_dir=folder, seed=3):
        assert distributed.is_enabled()
        assert (distributed.get_rank(), distributed.get_world_size()) == (0, 1)
        logging.getLogger("dinov3").info("attempt %d", attempt)
        _draws[:] = [torch.rand(()).item(), random.random(), np.random.rand()]
        raise ZeroDivisionError


def test_a_job_leaves_nothing_behind(tmp_path: Path) -> None:
    before = state()
    for attempt in range(2):
        with pytest.raises(ZeroDivisionError):
            failing_job(tmp_path / "out", attempt)
        assert state() == before
    text = (tmp_path / "out" / "logs" / "log.txt").read_text()
    assert text.count("attempt 0") == text.count("attempt 1") == 1
    assert "git: sha: " in text
    assert "conda environment: " in text
    assert "python path: " in text
    fix_random_seeds(3)
    assert _draws == [torch.rand(()).item(), random.random(), np.random.rand()]


def test_parts_can_be_left_out(tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(())
    torch.manual_seed(11)
    with job_context(distributed_enabled=False, logging_enabled=False, seed=None):
        assert not distributed.is_enabled()
        assert torch.rand(()).equal(expected)
        assert state()[2] == []


def test_unwritable_output_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = state()
    with pytest.raises(OSError, match=r"cannot write to the output folder .*file.*: choose another --output-dir"):
        setup_job(output_dir=tmp_path / "file" / "out")
    assert state() == before


def test_named_loggers_are_closed_too(tmp_path: Path) -> None:
    from dinov3.logging import setup_logging

    with job_context(output_dir=tmp_path):
        setup_logging(output=str(tmp_path / "nan_logs"), name="nan_logger")
        assert logging.getLogger("nan_logger").handlers
    assert not logging.getLogger("nan_logger").handlers
    assert (tmp_path / "nan_logs" / "logs" / "log.txt").exists()


def _job(folder: Path) -> tuple[int, int, float]:
    setup_job(output_dir=folder, seed=5)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    draw = torch.rand(()).item()
    exit_job()
    return rank, world, draw


def test_two_processes_have_their_own_seeds_and_files(tmp_path: Path) -> None:
    results = run_distributed(_job, 2, tmp_path, tmp_path / "out", init_group=False)
    for rank, result in enumerate(results):
        torch.manual_seed(5 + rank)
        assert result == (rank, 2, torch.rand(()).item())
    assert {p.name for p in (tmp_path / "out" / "logs").iterdir()} == {"log.txt", "log.txt.rank1"}
