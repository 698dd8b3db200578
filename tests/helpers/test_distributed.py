"""The helper that runs tests on several processes: it reports failures and leaves no process behind."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers.distributed import run_distributed


def rank_and_sum(number: int) -> tuple[int, str, int]:
    gathered: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(gathered, number + dist.get_rank())
    return dist.get_rank(), os.environ["RANK"], sum(gathered)


def fail_on_one_rank() -> None:
    if dist.get_rank() == 1:
        raise LookupError("what went wrong")
    dist.barrier()  # the other rank would wait here for ever


def sleep() -> bool:
    time.sleep(60)
    return dist.is_initialized()


def test_results_come_in_rank_order(tmp_path: Path) -> None:
    assert run_distributed(rank_and_sum, 2, tmp_path, 10) == [(0, "0", 21), (1, "1", 21)]


def test_the_traceback_of_a_rank_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="(?s)rank 1 .*in fail_on_one_rank.*LookupError: what went wrong"):
        run_distributed(fail_on_one_rank, 2, tmp_path)
    assert not multiprocessing.active_children()


def test_processes_that_hang_are_ended(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ranks \[0\] of 1 did not finish"):
        run_distributed(sleep, 1, tmp_path, init_group=False, timeout_s=1)
    assert not multiprocessing.active_children()
