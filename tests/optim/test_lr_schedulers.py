"""Schedulers of heads: ends and joints of the cycles, lengths of torch's, resuming, what is refused."""

import logging
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dinov3.optim.lr_schedulers import WarmupMultiStepLR, WarmupOneCycleLR, build_scheduler


def _adamw(*lrs: float) -> AdamW:
    return AdamW([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs or (1.0,)])


def _run(optimizer: Optimizer, scheduler: LRScheduler, steps: int) -> list[float]:
    """Learning rates after 0 to `steps` steps."""
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_warm_up_meets_the_decay_and_ends_at_the_smallest_rate() -> None:
    optimizer = _adamw()
    rates = _run(optimizer, WarmupOneCycleLR(optimizer, total_steps=1000, warmup_iters=100, warmup_ratio=1e-6), 999)
    assert rates[0] == pytest.approx(1e-6)
    assert max(rates) == pytest.approx(
        0.975, abs=0.01
    )  # the decay begins with the training, not with the warm-up's end
    assert rates.index(max(rates)) == 100
    assert rates[999] == pytest.approx(1 / 25 / 1000)


@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_momentum_is_zero_in_the_warm_up_then_rises(strategy: Any) -> None:
    optimizer = _adamw()
    scheduler = WarmupOneCycleLR(optimizer, total_steps=10, warmup_iters=4, anneal_strategy=strategy)
    momenta = [optimizer.param_groups[0]["betas"][0]]
    for _ in range(10):
        _run(optimizer, scheduler, 1)
        momenta.append(optimizer.param_groups[0]["betas"][0])
    assert momenta[:4] == [0, 0, 0, 0]
    assert momenta[4] == pytest.approx(0.85)
    assert momenta[7] == pytest.approx(0.90)
    assert momenta[10] == pytest.approx(0.95)
    assert optimizer.param_groups[0]["betas"][1] == 0.999


def test_every_group_has_its_own_peak() -> None:
    optimizer = _adamw(1.0, 0.1)
    scheduler = WarmupOneCycleLR(optimizer, max_lr=7.0, total_steps=10, warmup_iters=2)
    for _ in range(10):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(0.1 * first)
        _run(optimizer, scheduler, 1)


def test_momentum_of_the_configuration_stays_where_the_schedule_has_none() -> None:
    optimizer = _adamw()
    scheduler = WarmupOneCycleLR(
        optimizer, total_steps=5, final_div_factor=math.inf, use_beta1=False, update_momentum=False
    )
    assert _run(optimizer, scheduler, 4)[-1] == 0
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("name", ["WarmupOneCycleLR", "WarmupMultiStepLR", "OneCycleLR", "PolynomialLR"])
def test_a_training_that_goes_on_has_the_same_rates(name: str) -> None:
    def make() -> tuple[Optimizer, LRScheduler]:
        optimizer = _adamw(0.1)
        return optimizer, build_scheduler(name, optimizer, 0.1, 12, {"warmup_iters": 3})

    whole = _run(*make(), 11)
    optimizer, scheduler = make()
    _run(optimizer, scheduler, 5)
    saved = optimizer.state_dict(), scheduler.state_dict()
    optimizer, scheduler = make()
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    assert _run(optimizer, scheduler, 6) == whole[5:]


def test_multi_step_passes_one_milestone_at_a_time() -> None:
    optimizer = _adamw()
    scheduler = WarmupMultiStepLR(optimizer, total_steps=10, milestones=(0.5, 0.5, 1.0), warmup_iters=4)
    expected = [0.25, 0.5, 0.75, 1, 0.1, 0.01, 0.01, 0.01, 0.01, 0.001, 0.001]
    assert _run(optimizer, scheduler, 10) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["ConstantLR", "LinearLR", "PolynomialLR"])
def test_torchs_schedulers_last_as_long_as_the_training_unless_told_otherwise(name: str) -> None:
    given: dict[str, Any] = {}
    assert build_scheduler(name, _adamw(), 1.0, 40, given).total_iters == 40  # type: ignore[attr-defined]
    assert given == {}
    assert build_scheduler(name, _adamw(), 1.0, 40, {"total_iters": 7}).total_iters == 7  # type: ignore[attr-defined]


def test_unknown_options_are_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dinov3"):
        build_scheduler("StepLR", _adamw(), 1.0, 10, {"step_size": 3, "warmup_iters": 5})
    assert "StepLR has no option warmup_iters: ignored" in caplog.text


def test_what_is_refused() -> None:
    optimizer = _adamw()
    with pytest.raises(ValueError, match="unknown scheduler 'CosineLR'; known: ConstantLR, LinearLR"):
        build_scheduler("CosineLR", optimizer, 1.0, 10, {})
    with pytest.raises(ValueError, match="step 4 of a schedule of total_steps=3"):
        _run(optimizer, WarmupOneCycleLR(optimizer, total_steps=3), 4)
    with pytest.raises(ValueError, match="SGD has no betas: set use_beta1=False"):
        WarmupOneCycleLR(SGD([nn.Parameter(torch.zeros(1))], lr=1.0), total_steps=3)
    for options, message in (
        ({}, "total_steps must be positive"),
        ({"total_steps": 3, "warmup_iters": 4}, "warmup_iters must be from 0 to total_steps=3, got 4"),
        ({"total_steps": 3, "anneal_strategy": "exp"}, "anneal_strategy is 'cos' or 'linear'"),
    ):
        with pytest.raises(ValueError, match=message):
            WarmupOneCycleLR(_adamw(), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="milestones must ascend"):
        WarmupMultiStepLR(_adamw(), total_steps=3, milestones=(0.5, 0.2))
