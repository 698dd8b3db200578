"""Losses: what invalid pixels may hold, batches without valid pixels, the counter of calls."""

import pytest
import torch
from torch import nn

from dinov3.eval.depth.loss import GradientLoss, L1Loss, LossType, MultiLoss, SigLoss


@pytest.mark.parametrize("kind", LossType)
def test_invalid_pixels_have_no_influence_whatever_they_hold(kind: LossType) -> None:
    pred = (1 + torch.rand(2, 1, 20, 30)).requires_grad_()
    target, mask = 1 + torch.rand(2, 1, 20, 30), torch.rand(2, 1, 20, 30) > 0.3
    spoiled = torch.where(mask, target, torch.nan)
    clean = kind.module()(pred, torch.where(mask, target, 1.0), mask)
    (want,) = torch.autograd.grad(clean, pred)
    got = kind.module()(pred, spoiled, mask)
    (grad,) = torch.autograd.grad(got, pred)
    torch.testing.assert_close(got, clean)
    torch.testing.assert_close(grad, want)
    assert (grad[~mask] == 0).all()


@pytest.mark.parametrize("kind", LossType)
def test_no_valid_pixel_gives_zero_with_a_gradient(kind: LossType) -> None:
    loss = kind.module()
    if isinstance(loss, SigLoss):
        loss.n_calls = 1000
    pred = (1 + torch.rand(2, 1, 8, 8)).requires_grad_()
    value = loss(pred, torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.bool))
    (grad,) = torch.autograd.grad(value, pred)
    assert value == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("kind", LossType)
def test_a_perfect_prediction_has_no_loss_and_a_finite_gradient(kind: LossType) -> None:
    target = 1 + torch.rand(1, 1, 16, 16)
    pred = target.clone().requires_grad_()
    value = kind.module()(pred, target)
    (grad,) = torch.autograd.grad(value, pred)
    assert value == 0
    assert torch.isfinite(grad).all()


def test_siglosss_ignores_scale_after_its_warm_up() -> None:
    target = 1 + torch.rand(1, 1, 16, 16)
    loss = SigLoss(warm_iter=1)
    first, second = loss(1.5 * target, target), loss(1.5 * target, target)
    log_ratio = torch.log(1.5 * target + 0.001) - torch.log(target + 0.001)
    torch.testing.assert_close(first, 0.15**0.5 * log_ratio.mean())
    torch.testing.assert_close(second, (log_ratio.var() + 0.15 * log_ratio.mean() ** 2).sqrt())


def test_the_counter_is_saved() -> None:
    loss = MultiLoss({"SIGLOSS": 1.0, LossType.L1: 0.5})
    pred, target = 1 + torch.rand(1, 1, 8, 8), 1 + torch.rand(1, 1, 8, 8)
    for _ in range(3):
        loss(pred, target)
    again = MultiLoss({"SIGLOSS": 1.0, "L1": 0.5})
    again.load_state_dict(loss.state_dict())
    counters = [module.n_calls for module in again.modules() if isinstance(module, SigLoss)]
    assert counters == [3]


def test_values_by_hand() -> None:
    pred, target = torch.zeros(1, 1, 1, 3), torch.tensor([[[[1.0, 0.0, 3.0]]]])
    torch.testing.assert_close(L1Loss()(pred, target), torch.tensor(4 / 3))
    # |(-1) - (-3)| along the row of 3 valid pixels at the full scale; nothing is 2 apart at the others.
    torch.testing.assert_close(GradientLoss()(pred, target), torch.tensor(2 / 3))


def test_unknown_and_no_losses() -> None:
    with pytest.raises(ValueError, match="unknown loss 'huber'; known: SIGLOSS"):
        MultiLoss({"huber": 1.0})
    with pytest.raises(ValueError, match="expected at least one loss"):
        MultiLoss({})
    assert isinstance(LossType.L1.module(), nn.Module)
