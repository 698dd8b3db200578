"""What a training says about the checkpoint it is about to continue from."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from dinov3.checkpointer import save_checkpoint
from dinov3.train.resume import RecordedConfig, check_same_student


class Holder(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.student = nn.Sequential(*(nn.Linear(2, 2) for _ in range(depth)))


def test_a_checkpoint_of_another_student_is_refused_with_the_names_that_differ(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "3", iteration=3, model=Holder(2))
    check_same_student(tmp_path / "3", Holder(2).student)
    with pytest.raises(ValueError, match=r"another model: 2 tensors \(2.bias, 2.weight\) are missing.*--output-dir"):
        check_same_student(tmp_path / "3", Holder(3).student)
    with pytest.raises(ValueError, match=r"2 tensors \(1.bias, 1.weight\) are too many"):
        check_same_student(tmp_path / "3", Holder(1).student)


def test_tensors_of_another_shape_are_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "3", iteration=3, model=Holder(1))
    wider = Holder(1)
    wider.student[0] = nn.Linear(2, 5)
    with pytest.raises(ValueError, match=r"2 tensors \(0.bias \[2\] instead of \[5\], 0.weight .* another shape"):
        check_same_student(tmp_path / "3", wider.student)


def test_changed_settings_are_named_and_those_of_execution_are_not(caplog: pytest.LogCaptureFixture) -> None:
    saved = RecordedConfig({"optim.lr": 0.1, "train.num_workers": 4, "crops.sizes": [1, 2]}).state_dict()
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        RecordedConfig({"optim.lr": 0.1, "train.num_workers": 0, "crops.sizes": [1, 2]}).load_state_dict(saved)
        assert caplog.text == ""
        RecordedConfig({"optim.lr": 0.2, "train.num_workers": 4, "crops.sizes": [1, 2]}).load_state_dict(saved)
    assert "optim.lr: 0.1 -> 0.2" in caplog.text


def test_the_recorded_configuration_survives_a_checkpoint(tmp_path: Path) -> None:
    from dinov3.checkpointer import load_checkpoint

    model = Holder(1)
    save_checkpoint(tmp_path / "0", iteration=0, model=model, config=RecordedConfig({"a": None, "b": [1.5]}))
    torch.nn.init.zeros_(model.student[0].weight)
    assert load_checkpoint(tmp_path / "0", model=model, config=RecordedConfig({"a": None, "b": [1.5]})) == 0
    assert model.student[0].weight.abs().sum() > 0
