import random

import numpy as np
import pytest
import torch

from dinov3.data.seeded import seeded_draws


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_draws_depend_on_the_key_alone() -> None:
    with seeded_draws("sample", 1, 2):
        first = draw()
    draw()
    with seeded_draws("sample", 1, 2):
        assert draw() == first
    for other in (("sample", 1, 3), ("batch", 1, 2), ("sample", 12), ("sample", "1", 2)):
        with seeded_draws(*other):
            again = draw()
        assert all(a != b for a, b in zip(again, first, strict=True))


def test_the_generators_continue_as_if_nothing_had_happened() -> None:
    draw()
    random.gauss(0, 1)  # leaves a second value behind, which is part of the state
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw(), random.gauss(0, 1)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])

    def fail() -> None:
        with seeded_draws("x"):
            draw()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (draw(), random.gauss(0, 1)) == expected


def test_keys_give_uniform_draws() -> None:
    values = []
    for i in range(2000):
        with seeded_draws("sample", 0, 0, i, 0):
            values.append(draw())
    means = np.mean(values, axis=0)
    np.testing.assert_allclose(means, 0.5, atol=5 * (1 / 12 / 2000) ** 0.5)
    assert abs(np.corrcoef(np.array(values).T)[0, 1]) < 0.15
