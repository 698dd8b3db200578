"""Learning-rate schedulers of task heads: torch's interface, and the two cycles that only these trainings use.

`schedules.py` holds the schedules of pretraining, which are plain arrays.
"""

import inspect
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    StepLR,
)

logger = logging.getLogger("dinov3")


class WarmupOneCycleLR(LRScheduler):
    """Warm-up, then one long decay from each group's learning rate to almost nothing.

    With s the number of steps taken, T `total_steps`, w `warmup_iters`, r `warmup_ratio`, M the group's learning rate
    and m = M / div_factor / final_div_factor:

        s < w, r > 0:   M (1 - (1 - s/w) (1 - r)) (1 - s/T)
        s < w, r = 0:   M / final_div_factor + s/w M (1 + cos(pi s/T)) / 2
        s >= w, cos:    m + (M - m) (1 + cos(pi (s + 1)/T)) / 2
        s >= w, linear: M + (m - M) s/T

    Momentum is 0 during warm-up (published heads were trained so), then goes from `base_momentum` to `max_momentum`.

    Args:
        optimizer: its groups' learning rates are the peaks.
        max_lr, pct_start: without effect; accepted as the published configurations give them.
        total_steps: T; further steps are an error.
        warmup_iters: w.
        warmup_ratio: r.
        anneal_strategy: shape of the decays of learning rate and momentum.
        base_momentum, max_momentum: first and last momentum after the warm-up.
        div_factor, final_div_factor: decide on m; `inf` ends at 0.
        use_beta1: momentum is Adam's first beta, whatever the optimizer's configuration says.
        update_momentum: without `use_beta1`: momentum is the group's entry `momentum`.
        last_epoch: number of the last step of a training that goes on; -1: a new one.

    Raises:
        ValueError: contradictory arguments, or more than `total_steps` steps.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | None = None,
        total_steps: int = 0,
        warmup_iters: int = 0,
        warmup_ratio: float = 0.0,
        pct_start: float = 0.3,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        base_momentum: float = 0.85,
        max_momentum: float = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1000.0,
        use_beta1: bool = True,
        update_momentum: bool = True,
        last_epoch: int = -1,
    ) -> None:
        if total_steps <= 0:
            raise ValueError(f"total_steps must be positive, got {total_steps}")
        if not 0 <= warmup_iters <= total_steps:
            raise ValueError(f"warmup_iters must be from 0 to total_steps={total_steps}, got {warmup_iters}")
        if anneal_strategy not in ("cos", "linear"):
            raise ValueError(f"anneal_strategy is 'cos' or 'linear', got {anneal_strategy!r}")
        if use_beta1 and any("betas" not in group for group in optimizer.param_groups):
            raise ValueError(f"{type(optimizer).__name__} has no betas: set use_beta1=False")
        self.total_steps = total_steps
        self.warmup_iters = warmup_iters
        self.warmup_ratio = warmup_ratio
        self.anneal_strategy = anneal_strategy
        self.momenta = (base_momentum, max_momentum)
        self.final_div_factor = final_div_factor
        self.use_beta1 = use_beta1
        self.update_momentum = update_momentum
        if last_epoch == -1:
            for group in optimizer.param_groups:
                group["max_lr"] = group["lr"]
                group["initial_lr"] = group["lr"] / div_factor
                group["min_lr"] = group["initial_lr"] / final_div_factor
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """Learning rate of each group at the present step; sets their momenta."""
        step = self.last_epoch
        if step > self.total_steps:
            raise ValueError(f"step {step} of a schedule of total_steps={self.total_steps}: train no longer than that")
        momentum = self._momentum(step)
        for group in self.optimizer.param_groups:
            if self.use_beta1:
                group["betas"] = (momentum, *group["betas"][1:])
            elif self.update_momentum:
                group["momentum"] = momentum
        return [self._lr(step, float(group["max_lr"]), float(group["min_lr"])) for group in self.optimizer.param_groups]

    def _lr(self, step: int, peak: float, lowest: float) -> float:
        progress = step / self.total_steps
        if step >= self.warmup_iters:
            # The cosine is one step ahead of the line.
            return self._anneal(peak, lowest, (step + 1) / self.total_steps, progress)
        warmed = step / self.warmup_iters
        if self.warmup_ratio > 0:
            return peak * (1 - (1 - warmed) * (1 - self.warmup_ratio)) * (1 - progress)
        return peak / self.final_div_factor + warmed * peak * (1 + math.cos(math.pi * progress)) / 2

    def _momentum(self, step: int) -> float:
        if step < self.warmup_iters:
            return 0.0
        progress = (step - self.warmup_iters) / max(self.total_steps - self.warmup_iters, 1)
        return self._anneal(*self.momenta, progress, progress)

    def _anneal(self, start: float, end: float, cosine_progress: float, linear_progress: float) -> float:
        if self.anneal_strategy == "linear":
            return start + (end - start) * linear_progress
        return end + (start - end) * (1 + math.cos(math.pi * cosine_progress)) / 2


class WarmupMultiStepLR(LRScheduler):
    """Linear warm-up, then a division at each milestone.

    With c the number of the coming step (from 1) and M the group's learning rate: M c / warmup_iters while
    c < warmup_iters, then M gamma^k after k milestones, of which one step passes one at most.

    Args:
        optimizer: its groups' learning rates are the peaks.
        max_lr: without effect; accepted as the published configurations give it.
        total_steps: number of steps that milestones are fractions of.
        milestones: ascending fractions of `total_steps`.
        gamma: factor at each milestone.
        warmup_iters: length of the warm-up.
        last_epoch: number of the last step of a training that goes on; -1: a new one.

    Raises:
        ValueError: `total_steps` is not positive, or milestones don't ascend.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | None = None,
        total_steps: int = 0,
        milestones: Sequence[float] = (0.5, 0.9, 1.0),
        gamma: float = 0.1,
        warmup_iters: int = 0,
        last_epoch: int = -1,
    ) -> None:
        if total_steps <= 0:
            raise ValueError(f"total_steps must be positive, got {total_steps}")
        if list(milestones) != sorted(milestones):
            raise ValueError(f"milestones must ascend, got {list(milestones)}")
        self.total_steps = total_steps
        self.milestones = tuple(milestones)
        self.gamma = gamma
        self.warmup_iters = warmup_iters
        self.n_passed = 0
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """Learning rate of each group at the present step."""
        coming = self.last_epoch + 1
        if coming < self.warmup_iters:
            factor = coming / self.warmup_iters
        else:
            left = self.milestones[self.n_passed :]
            self.n_passed += bool(left) and coming >= self.total_steps * left[0]
            factor = self.gamma**self.n_passed
        return [factor * float(lr) for lr in self.base_lrs]


_CYCLES: dict[str, type[LRScheduler]] = {cls.__name__: cls for cls in (OneCycleLR, WarmupOneCycleLR, WarmupMultiStepLR)}
_TYPES: dict[str, type[LRScheduler]] = {
    cls.__name__: cls for cls in (ConstantLR, LinearLR, MultiStepLR, PolynomialLR, StepLR)
} | _CYCLES


def fast_forward(scheduler: LRScheduler, iterations: int) -> None:
    """Step a scheduler to where it is after so many iterations: for checkpoints that don't hold its state."""
    with warnings.catch_warnings():
        # No optimizer step comes before these on purpose.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        for _ in range(iterations):
            scheduler.step()


def build_scheduler(
    scheduler_type: str,
    optimizer: Optimizer,
    lr: float,
    total_iter: int,
    constructor_kwargs: Mapping[str, Any],
) -> LRScheduler:
    """The scheduler that a configuration names.

    Args:
        scheduler_type: `ConstantLR`, `LinearLR`, `MultiStepLR`, `PolynomialLR`, `StepLR`, `OneCycleLR`,
            `WarmupOneCycleLR` or `WarmupMultiStepLR`.
        optimizer: its learning rate should be `lr`.
        lr: peak of the cycles.
        total_iter: length of the training: `total_steps` of the cycles, and `total_iters` of the others that have one
            unless it is given.
        constructor_kwargs: further arguments; such as the class doesn't know are ignored with a warning in the log.

    Raises:
        ValueError: unknown type.
    """
    if scheduler_type not in _TYPES:
        raise ValueError(f"unknown scheduler {scheduler_type!r}; known: {', '.join(_TYPES)}")
    cls = _TYPES[scheduler_type]
    known = inspect.signature(cls).parameters
    if ignored := [key for key in constructor_kwargs if key not in known]:
        logger.warning("%s has no option %s: ignored", scheduler_type, ", ".join(ignored))
    kwargs = {key: value for key, value in constructor_kwargs.items() if key in known}
    if scheduler_type in _CYCLES:
        kwargs |= {"max_lr": lr, "total_steps": total_iter}
    elif "total_iters" in known:
        kwargs.setdefault("total_iters", total_iter)
    return cls(optimizer, **kwargs)
