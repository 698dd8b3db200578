"""Schedules of training: float64 values indexed by the 0-based iteration, made by pure functions of plain numbers.

Two families exist. `CosineScheduler` is the older one ("v1": a warm-up that includes its end point, a cosine that
never quite arrives). `linear_warmup_cosine_decay` is the newer one ("v2": start, peak, end). A configuration selects
one of them; how is told by the functions at the end, which take epochs as configurations do.
"""

import copy
import math
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray


class Schedule(Protocol):
    """A value for every iteration."""

    def __getitem__(self, iteration: int, /) -> float:
        """The value at a 0-based iteration."""
        ...


class CosineScheduler:
    """Zeros, then a linear warm-up, then a cosine from `base_value` towards `final_value`.

    The warm-up reaches `base_value` at its last iteration and the cosine starts there again. Its last iteration is one
    step short of `final_value`, which is the value of every iteration from `total_iters` on.

    Args:
        base_value: value at the end of the warm-up.
        final_value: value that the cosine goes to.
        total_iters: number of iterations of all three parts.
        warmup_iters: iterations of the warm-up, from `start_warmup_value` to `base_value`.
        start_warmup_value: first value of the warm-up.
        freeze_iters: iterations at the beginning with value 0.
        trunc_extra: if x is not 0, the cosine is stretched over 1 + x times its iterations, cut off where they end and
            rescaled so that it ends at exactly `final_value`: a decay that is steeper at the end.

    Raises:
        ValueError: the freeze and the warm-up are longer than `total_iters`, or `trunc_extra` is negative.
    """

    def __init__(
        self,
        base_value: float,
        final_value: float,
        total_iters: int,
        warmup_iters: int = 0,
        start_warmup_value: float = 0,
        freeze_iters: int = 0,
        trunc_extra: float = 0.0,
    ) -> None:
        n_cosine = total_iters - warmup_iters - freeze_iters
        if min(n_cosine, warmup_iters, freeze_iters) < 0:
            raise ValueError(
                f"freeze ({freeze_iters}) and warm-up ({warmup_iters}) iterations must not be negative nor exceed the "
                f"total ({total_iters}): shorten them or train longer"
            )
        if trunc_extra < 0:
            raise ValueError(f"trunc_extra must not be negative, got {trunc_extra}")
        self.final_value = float(final_value)
        self.total_iters = total_iters
        freeze = np.zeros(freeze_iters)
        warmup = np.linspace(start_warmup_value, base_value, warmup_iters)
        decay = final_value + (base_value - final_value) * _falling_cosine(n_cosine, trunc_extra)
        self.schedule: NDArray[np.float64] = np.concatenate([freeze, warmup, decay])

    def __getitem__(self, iteration: int) -> float:
        """The value at an iteration; `final_value` from `total_iters` on."""
        return self.final_value if iteration >= self.total_iters else float(self.schedule[iteration])

    def __len__(self) -> int:
        return self.total_iters


def _falling_cosine(n: int, trunc_extra: float) -> NDArray[np.float64]:
    """n values from 1 towards 0 (never 0), or to exactly 0 if truncated."""
    if trunc_extra == 0 or n < 2:
        return 0.5 * (1 + np.cos(np.pi * np.arange(n) / max(1, n)))
    angles = np.linspace(0, np.pi, int((1 + trunc_extra) * n))[:n]
    values = 0.5 * (1 + np.cos(angles))
    return (values - values[-1]) / (1 - values[-1])


def linear_warmup_cosine_decay(
    start: float,
    peak: float,
    end: float,
    warmup_iterations: int,
    total_iterations: int,
    cosine_iterations: int | None = None,
) -> NDArray[np.float64]:
    """Linear from `start` towards `peak`, cosine from `peak` to `end`, then constant.

    The warm-up stops one step before `peak`, which is the first value of the cosine; the cosine includes `end`. With
    start = peak the "decay" may also rise.

    Args:
        start, peak, end: values.
        warmup_iterations: length of the linear part.
        total_iterations: length of the result.
        cosine_iterations: length of the cosine; None: all that is left. A single one has the value `peak`.

    Returns:
        float64 array [total_iterations].

    Raises:
        ValueError: the parts are longer than the whole, or a length is negative.
    """
    if cosine_iterations is None:
        cosine_iterations = total_iterations - warmup_iterations
    n_constant = total_iterations - warmup_iterations - cosine_iterations
    if min(warmup_iterations, cosine_iterations, n_constant) < 0:
        raise ValueError(
            f"warm-up ({warmup_iterations}) and cosine ({cosine_iterations}) iterations must not be negative nor "
            f"exceed the total ({total_iterations}) together: shorten them or train longer"
        )
    warmup = np.linspace(start, peak, warmup_iterations, endpoint=False)
    cosine = end + (peak - end) * 0.5 * (1 + np.cos(np.linspace(0, np.pi, cosine_iterations)))
    return np.concatenate([warmup, cosine, np.full(n_constant, float(end))])


class TrainingSchedules(NamedTuple):
    """The five schedules of a training run."""

    lr: Schedule
    weight_decay: Schedule
    momentum: Schedule
    teacher_temp: Schedule
    last_layer_lr: Schedule


AnySchedule = TypeVar("AnySchedule", CosineScheduler, NDArray[np.float64])


def frozen_at_start(schedule: AnySchedule, n_iterations: int) -> AnySchedule:
    """A copy of `schedule` whose first `n_iterations` values are 0 (the learning rate of a last layer)."""
    frozen = copy.deepcopy(schedule)
    values = frozen.schedule if isinstance(frozen, CosineScheduler) else frozen
    values[:n_iterations] = 0.0
    return frozen


def epochs_to_iterations(epochs: float, epoch_length: int) -> int:
    """Number of iterations, rounded to the nearest, in so many epochs; halves of an epoch are allowed."""
    return round(epochs * epoch_length)


def lr_scale(rule: str | None, total_batch_size: int) -> float:
    """Factor of a learning rate that was chosen for a batch of 256 or 1024 samples.

    `linear_wrt_256`: batch / 256. `sqrt_wrt_1024`: 4 sqrt(batch / 1024) (rates of such recipes are given per 64
    samples of a batch of 1024, hence the 4). Any other rule: 1.
    """
    if rule == "linear_wrt_256":
        return total_batch_size / 256.0
    if rule == "sqrt_wrt_1024":
        return 4.0 * math.sqrt(total_batch_size / 1024.0)
    return 1.0


def warmup_cosine_from_epochs(
    *,
    start: float,
    peak: float,
    end: float,
    warmup_epochs: float,
    cosine_epochs: float | None = None,
    epochs: float,
    epoch_length: int,
) -> NDArray[np.float64]:
    """`linear_warmup_cosine_decay` with lengths in epochs of `epoch_length` iterations, `epochs` of them in all."""
    return linear_warmup_cosine_decay(
        start,
        peak,
        end,
        epochs_to_iterations(warmup_epochs, epoch_length),
        epochs_to_iterations(epochs, epoch_length),
        None if cosine_epochs is None else epochs_to_iterations(cosine_epochs, epoch_length),
    )


def cosine_training_schedules(
    *,
    epochs: float,
    epoch_length: int,
    lr: float,
    min_lr: float,
    warmup_epochs: float,
    freeze_last_layer_epochs: float,
    weight_decay: float,
    weight_decay_end: float,
    momentum_teacher: float,
    final_momentum_teacher: float,
    warmup_teacher_temp: float,
    teacher_temp: float,
    warmup_teacher_temp_epochs: float,
    schedule_trunc_extra: float = 0.0,
) -> TrainingSchedules:
    """All schedules of the older family ("v1"), of `epochs` epochs with `epoch_length` iterations.

    Learning rate: warm-up from 0 to `lr`, cosine to `min_lr`; the last layer's is 0 for its first epochs. Weight decay
    and momentum: cosine without warm-up. Teacher temperature: a linear warm-up, constant afterwards. Arguments are
    called as the keys of the sections `optim` and `teacher`; `lr` is the rate after scaling.

    Raises:
        ValueError: an argument is None, as in configurations made for the newer family.
    """
    missing = sorted(name for name, value in locals().items() if value is None)
    if missing:
        raise ValueError(
            f"{', '.join(missing)} must be set (sections optim and teacher) when the configuration has no section "
            "`schedules`; recipes that leave them null need their `schedules` section"
        )
    total = epochs_to_iterations(epochs, epoch_length)
    lr_schedule = CosineScheduler(
        lr, min_lr, total, epochs_to_iterations(warmup_epochs, epoch_length), trunc_extra=schedule_trunc_extra
    )
    temp_warmup = epochs_to_iterations(warmup_teacher_temp_epochs, epoch_length)
    return TrainingSchedules(
        lr=lr_schedule,
        weight_decay=CosineScheduler(weight_decay, weight_decay_end, total, trunc_extra=schedule_trunc_extra),
        momentum=CosineScheduler(momentum_teacher, final_momentum_teacher, total, trunc_extra=schedule_trunc_extra),
        teacher_temp=CosineScheduler(teacher_temp, teacher_temp, temp_warmup, temp_warmup, warmup_teacher_temp),
        last_layer_lr=frozen_at_start(lr_schedule, epochs_to_iterations(freeze_last_layer_epochs, epoch_length)),
    )
