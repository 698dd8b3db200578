import random
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov3.checkpointer import RandomState, load_checkpoint, save_checkpoint
from tests.helpers.distributed import run_distributed


def draws() -> list[float]:
    return [torch.rand(()).item(), random.random(), random.gauss(0, 1), float(np.random.rand()), np.random.randn()]


def test_every_generator_goes_on_where_it_was() -> None:
    random.gauss(0, 1)  # leaves a second value in reserve
    np.random.randn()
    state = RandomState().state_dict()
    expected = draws()
    draws()
    RandomState().load_state_dict(state)
    assert draws() == expected


def test_another_rank_has_no_state_here(caplog: pytest.LogCaptureFixture) -> None:
    RandomState().load_state_dict({"rank_5": {}})
    assert any("no random states of rank 0" in message for message in caplog.messages)


def _save(folder: Path) -> list[float]:
    torch.manual_seed(100 + torch.distributed.get_rank())
    save_checkpoint(folder, iteration=0, model=torch.nn.Linear(2, 2), random=RandomState())
    return [torch.rand(()).item()]


def _load(folder: Path) -> list[float]:
    torch.manual_seed(5)
    load_checkpoint(folder, model=torch.nn.Linear(2, 2), random=RandomState())
    return [torch.rand(()).item()]


def test_one_state_per_rank(tmp_path: Path) -> None:
    saved = run_distributed(_save, 2, tmp_path, tmp_path / "0")
    assert saved[0] != saved[1]
    loaded = run_distributed(_load, 3, tmp_path, tmp_path / "0")
    assert loaded[:2] == saved
    assert loaded[2] not in saved
