"""The parts of the training loop that decide something."""

import json
from pathlib import Path

import pytest
import torch

from dinov3.train.loop import NonFinitePolicy, drop_rows_from, mean_over_parts, seed_iteration
from dinov3.train.optimizer import apply_optim_scheduler, clip_gradients


def test_a_non_finite_loss_skips_the_step_and_the_third_in_a_row_ends_the_training() -> None:
    policy = NonFinitePolicy(patience=2)
    bad, good = torch.tensor(torch.nan), torch.tensor(1.0)
    assert policy.skips(0, bad, {"ibot_loss": bad})
    assert policy.skips(1, torch.tensor(torch.inf), {})
    assert not policy.skips(2, good, {})
    assert policy.skips(3, bad, {})
    assert policy.skips(4, bad, {})
    with pytest.raises(RuntimeError, match=r"iteration 5 on ranks \[0\] \(3 in a row\).*'ibot_loss': nan.*resume"):
        policy.skips(5, bad, {"ibot_loss": bad})


def test_a_policy_without_patience_never_ends_the_training() -> None:
    policy = NonFinitePolicy(patience=None)
    assert all(policy.skips(i, torch.tensor(torch.nan), {}) for i in range(10))


def test_metric_rows_that_will_be_done_again_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "training_metrics.json"
    rows = [json.dumps({"iteration": i, "total_loss": 1.0}) for i in (0, 10, 20)]
    file.write_text("\n".join(rows) + "\n" + '{"iteration": 30, "tot')  # killed while writing
    drop_rows_from(file, 20)
    assert file.read_text() == "".join(f"{row}\n" for row in rows[:2])
    drop_rows_from(tmp_path / "none.json", 5)
    assert not (tmp_path / "none.json").exists()


def test_accumulated_parts_give_means_and_the_size_of_the_whole_batch() -> None:
    parts = [(torch.tensor(float(i)), {"local_batch_size": 2.0, "ibot_loss": torch.tensor(3.0 * i)}) for i in range(3)]
    loss, metrics = mean_over_parts(parts)
    assert (loss.item(), metrics["local_batch_size"], float(metrics["ibot_loss"])) == (1.0, 6.0, 3.0)


def test_draws_depend_on_seed_and_iteration_only() -> None:
    def draws(seed: int, iteration: int) -> list[float]:
        seed_iteration(seed, iteration)
        return torch.rand(3).tolist()

    first = draws(0, 7)
    draws(1, 2)
    assert draws(0, 7) == first
    assert draws(0, 8) != first
    assert draws(1, 7) != first


def test_groups_follow_the_schedules_by_their_multipliers() -> None:
    body, last = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    groups = [
        {"params": [body], "lr_multiplier": 0.5, "wd_multiplier": 0.0, "is_last_layer": False},
        {"params": [last], "lr_multiplier": 2.0, "wd_multiplier": 1.0, "is_last_layer": True},
    ]
    optimizer = torch.optim.AdamW(groups)
    apply_optim_scheduler(optimizer, lr=0.1, wd=0.04, last_layer_lr=0.0)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.05, 0.0), (0.0, 0.04)]


def test_each_part_of_the_student_is_clipped_by_its_own_norm() -> None:
    student = torch.nn.ModuleDict(
        {"backbone": torch.nn.Linear(2, 1, bias=False), "dino_head": torch.nn.Linear(2, 1, bias=False)}
    )
    student["backbone"].weight.grad = torch.tensor([[3.0, 4.0]])
    student["dino_head"].weight.grad = torch.tensor([[0.3, 0.4]])
    norms = clip_gradients(student, 1.0)
    assert norms["backbone_grad_norm"].item() == pytest.approx(5.0)
    assert norms["dino_head_grad_norm"].item() == pytest.approx(0.5)
    assert student["backbone"].weight.grad.norm().item() == pytest.approx(1.0, rel=1e-4)
    assert student["dino_head"].weight.grad.norm().item() == pytest.approx(0.5)
    assert clip_gradients(student, None) == {}
