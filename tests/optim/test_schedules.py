import numpy as np
import pytest

from dinov3.optim import (
    CosineScheduler,
    cosine_training_schedules,
    epochs_to_iterations,
    frozen_at_start,
    linear_warmup_cosine_decay,
    lr_scale,
    warmup_cosine_from_epochs,
)

V1 = {
    "epochs": 10,
    "epoch_length": 4,
    "lr": 1.0,
    "min_lr": 0.1,
    "warmup_epochs": 2,
    "freeze_last_layer_epochs": 1,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "momentum_teacher": 0.9,
    "final_momentum_teacher": 1.0,
    "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.07,
    "warmup_teacher_temp_epochs": 3,
}


def test_cosine_scheduler_at_its_joints() -> None:
    schedule = CosineScheduler(2.0, 0.5, 20, warmup_iters=5, start_warmup_value=0.2, freeze_iters=3)
    assert [schedule[i] for i in range(3)] == [0.0, 0.0, 0.0]
    assert schedule[3] == 0.2
    assert schedule[7] == schedule[8] == 2.0  # the warm-up's end point, and the cosine's first value
    assert 0.5 < schedule[19] < schedule[18]  # never quite the final value ...
    assert schedule[20] == schedule[10_000] == 0.5  # ... until the end
    assert len(schedule) == 20
    assert all(isinstance(schedule[i], float) for i in (0, 5, 25))


def test_truncated_cosine_ends_at_its_final_value_and_more_steeply() -> None:
    whole, truncated = CosineScheduler(1.0, 0.1, 100), CosineScheduler(1.0, 0.1, 100, trunc_extra=0.25)
    assert truncated[0] == 1.0
    assert truncated[99] == pytest.approx(0.1)
    assert truncated[98] - truncated[99] > whole[98] - whole[99]
    assert np.all(np.diff(truncated.schedule) <= 0)


@pytest.mark.parametrize("n", [0, 1])
def test_truncated_cosine_of_hardly_any_iterations(n: int) -> None:
    schedule = CosineScheduler(1.0, 0.1, 3 + n, warmup_iters=3, trunc_extra=0.25)
    assert np.isfinite(schedule.schedule).all()
    assert schedule[3] == (1.0 if n else 0.1)


@pytest.mark.parametrize(
    "options", [{"warmup_iters": 11}, {"warmup_iters": 8, "freeze_iters": 3}, {"warmup_iters": -1}]
)
def test_cosine_scheduler_with_parts_that_do_not_fit(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="exceed the total"):
        CosineScheduler(1.0, 0.0, 10, **options)


def test_cosine_scheduler_with_negative_truncation() -> None:
    with pytest.raises(ValueError, match="trunc_extra"):
        CosineScheduler(1.0, 0.0, 10, trunc_extra=-0.1)


def test_warmup_cosine_at_its_joints() -> None:
    values = linear_warmup_cosine_decay(0.0, 1.0, 0.2, warmup_iterations=4, total_iterations=20, cosine_iterations=9)
    assert values.dtype == np.float64
    assert len(values) == 20
    np.testing.assert_allclose(values[:4], [0.0, 0.25, 0.5, 0.75])  # without the peak
    assert values[4] == 1.0
    assert values[8] == pytest.approx(0.6)  # half-way
    np.testing.assert_allclose(values[12:], 0.2)  # the cosine includes its end


def test_warmup_cosine_fills_what_is_left() -> None:
    values = linear_warmup_cosine_decay(0.0, 1.0, 0.2, 4, 20)
    assert values[-1] == pytest.approx(0.2)
    assert values[-2] > values[-1]


def test_warmup_cosine_can_rise() -> None:
    values = linear_warmup_cosine_decay(0.0, 0.0, 2.0, 5, 10, cosine_iterations=3)
    np.testing.assert_allclose(values, [0] * 6 + [1.0] + [2.0] * 3, atol=1e-15)


@pytest.mark.parametrize(("cosine", "first"), [(0, 0.2), (1, 1.0)])
def test_warmup_cosine_with_hardly_any_cosine(cosine: int, first: float) -> None:
    values = linear_warmup_cosine_decay(0.0, 1.0, 0.2, 2, 6, cosine_iterations=cosine)
    assert values[2] == first
    np.testing.assert_allclose(values[3:], 0.2)


@pytest.mark.parametrize(("warmup", "cosine"), [(11, None), (5, 6), (-1, 3), (3, -1)])
def test_warmup_cosine_with_parts_that_do_not_fit(warmup: int, cosine: int | None) -> None:
    with pytest.raises(ValueError, match=r"exceed the total \(10\)"):
        linear_warmup_cosine_decay(0.0, 1.0, 0.2, warmup, 10, cosine)


def test_epochs_may_be_fractions() -> None:
    assert epochs_to_iterations(0.5, 5) == 2
    assert epochs_to_iterations(0.3, 10) == 3  # 3.0000000000000004 or less in floating point
    values = warmup_cosine_from_epochs(start=0, peak=1, end=0, warmup_epochs=1.5, epochs=4, epoch_length=10)
    assert len(values) == 40
    assert values.argmax() == 15
    constant = warmup_cosine_from_epochs(
        start=1, peak=1, end=3, warmup_epochs=0, cosine_epochs=0.1, epochs=1, epoch_length=10
    )
    np.testing.assert_allclose(constant, [1.0] + [3.0] * 9)


def test_frozen_copy_leaves_the_original() -> None:
    for schedule in (CosineScheduler(1.0, 0.5, 10), linear_warmup_cosine_decay(1.0, 1.0, 0.5, 0, 10)):
        frozen = frozen_at_start(schedule, 3)
        assert [frozen[i] for i in range(3)] == [0, 0, 0]
        assert frozen[3] == schedule[3] > 0
        assert schedule[0] == 1.0


def test_older_family_of_schedules() -> None:
    s = cosine_training_schedules(**V1)
    assert s.lr[0] == 0
    assert s.lr[7] == s.lr[8] == 1.0
    assert s.lr[40] == 0.1
    assert [s.last_layer_lr[i] for i in range(4)] == [0.0] * 4
    assert [s.last_layer_lr[i] for i in range(4, 41)] == [s.lr[i] for i in range(4, 41)]
    assert (s.weight_decay[0], s.weight_decay[40]) == pytest.approx((0.04, 0.4))
    assert (s.momentum[0], s.momentum[40]) == pytest.approx((0.9, 1.0))
    assert (s.teacher_temp[0], s.teacher_temp[11], s.teacher_temp[12]) == (0.04, 0.07, 0.07)


def test_older_family_names_every_key_that_is_null() -> None:
    with pytest.raises(ValueError, match="lr, weight_decay_end must be set .* section `schedules`"):
        cosine_training_schedules(**{**V1, "lr": None, "weight_decay_end": None})


def test_learning_rate_scaling() -> None:
    assert lr_scale("linear_wrt_256", 512) == 2.0
    assert lr_scale("sqrt_wrt_1024", 64) == 1.0
    assert lr_scale("sqrt_wrt_1024", 1024) == 4.0
    assert lr_scale("none", 64) == lr_scale(None, 64) == 1.0
