"""Losses between depth maps `[B, 1, H, W]` in metres, over valid pixels; a batch without any gives 0, with a gradient.

None of them waits for the device.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

_EPS = 0.001
"""Added to depths before logarithms [metres]."""


def _valid(pred: Tensor, valid_mask: Tensor | None) -> Tensor:
    if valid_mask is None:
        return torch.ones_like(pred, dtype=torch.bool)
    return valid_mask.expand_as(pred)


def _log_difference(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """log pred - log target; 0, without gradient, at invalid pixels, whatever they hold."""
    pred, target = torch.where(mask, pred, 1.0), torch.where(mask, target, 1.0)
    return torch.log(pred + _EPS) - torch.log(target + _EPS)


class SigLoss(nn.Module):
    """Scale-invariant loss: sqrt(var(g) + 0.15 mean(g)^2) with g = log(pred + 0.001) - log(target + 0.001).

    Statistics are those of all valid pixels of the batch, the variance is the unbiased one. During the first calls
    there is no variance, so that the head finds the scale first. The number of calls is part of the state dict.

    Args:
        warm_up: leave out the variance at first.
        warm_iter: for so many calls.

    Source: Eigen et al., https://arxiv.org/abs/1406.2283, equation 4, in the form of later works.
    """

    def __init__(self, warm_up: bool = True, warm_iter: int = 100) -> None:
        super().__init__()
        self.warm_up, self.warm_iter = warm_up, warm_iter
        self.n_calls = 0

    def forward(self, pred: Tensor, target: Tensor, valid_mask: Tensor | None = None) -> Tensor:
        """A scalar; see the module's docstring."""
        mask = _valid(pred, valid_mask)
        g = _log_difference(pred, target, mask)
        count = mask.sum()
        mean = g.sum() / count.clamp(min=1)
        value = 0.15 * mean.square()
        warming_up = self.warm_up and self.n_calls < self.warm_iter
        self.n_calls += 1
        if not warming_up:
            value = value + torch.where(mask, g - mean, 0.0).square().sum() / (count - 1).clamp(min=1)
        positive = value > 0
        return torch.where(positive, torch.where(positive, value, 1.0).sqrt(), value)  # no root, no gradient at 0

    def get_extra_state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"n_calls": self.n_calls}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.n_calls = int(state["n_calls"])


class GradientLoss(nn.Module):
    """Differences between neighbours two pixels apart, along rows and columns, at four scales.

    Scales are every s-th pixel, s = 1, 2, 4, 6; at each the sum of |d[i] - d[i + 2]|, where both are valid, is divided
    by the number of valid pixels. d is the error in metres.
    """

    scales = (1, 2, 4, 6)

    def forward(self, pred: Tensor, target: Tensor, valid_mask: Tensor | None = None) -> Tensor:
        """A scalar; see the module's docstring."""
        mask = _valid(pred, valid_mask)
        difference = self.difference(pred, target, mask)
        terms = [self._at_scale(difference[..., ::s, ::s], mask[..., ::s, ::s]) for s in self.scales]
        return torch.stack(terms).sum()

    def difference(self, pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Error per pixel, 0 where invalid."""
        return torch.where(mask, pred, 0.0) - torch.where(mask, target, 0.0)

    def _at_scale(self, d: Tensor, mask: Tensor) -> Tensor:
        rows = (d[..., :-2, :] - d[..., 2:, :]).abs() * (mask[..., :-2, :] & mask[..., 2:, :])
        columns = (d[..., :-2] - d[..., 2:]).abs() * (mask[..., :-2] & mask[..., 2:])
        return (rows.sum() + columns.sum()) / mask.sum().clamp(min=1)


class GradientLogLoss(GradientLoss):
    """`GradientLoss` of log(depth + 0.001)."""

    def difference(self, pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Error of the logarithm per pixel, 0 where invalid."""
        return _log_difference(pred, target, mask)


class L1Loss(nn.Module):
    """Mean absolute error [metres]."""

    def forward(self, pred: Tensor, target: Tensor, valid_mask: Tensor | None = None) -> Tensor:
        """A scalar; see the module's docstring."""
        mask = _valid(pred, valid_mask)
        error = torch.where(mask, pred, 0.0) - torch.where(mask, target, 0.0)
        return error.abs().sum() / (mask.sum() + 1e-7)


class LossType(Enum):
    """Names of losses in configurations."""

    SIGLOSS = "sigloss"
    GRADIENT_LOSS = "gradient_loss"
    GRADIENT_LOG_LOSS = "gradient_log_loss"
    L1 = "l1"

    def module(self) -> nn.Module:
        """A new loss of this type."""
        return _CLASSES[self]()


_CLASSES: dict[LossType, type[nn.Module]] = {
    LossType.SIGLOSS: SigLoss,
    LossType.GRADIENT_LOSS: GradientLoss,
    LossType.GRADIENT_LOG_LOSS: GradientLogLoss,
    LossType.L1: L1Loss,
}


class MultiLoss(nn.Module):
    """Weighted sum of losses.

    Args:
        losses: weight by type, or by its name.

    Raises:
        ValueError: no loss, or an unknown name.
    """

    def __init__(self, losses: Mapping[LossType | str, float]) -> None:
        super().__init__()
        known = ", ".join(LossType.__members__)
        if not losses:
            raise ValueError(
                f"expected at least one loss with its weight, such as losses={{SIGLOSS: 1.0}}; known: {known}"
            )
        self.weights: dict[str, float] = {}
        self.losses = nn.ModuleDict()
        for kind, weight in losses.items():
            name = kind.name if isinstance(kind, LossType) else str(kind).upper()
            if name not in LossType.__members__:
                raise ValueError(f"unknown loss {kind!r}; known: {known}")
            self.weights[name] = float(weight)
            self.losses[name] = LossType[name].module()

    def forward(self, pred: Tensor, target: Tensor, valid_mask: Tensor | None = None) -> Tensor:
        """A scalar."""
        terms = [self.weights[name] * loss(pred, target, valid_mask) for name, loss in self.losses.items()]
        return torch.stack(terms).sum()
