"""Weights of the loss terms."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinov3.train.objectives import dino_pair_scales, weight_at


@given(n_global=st.integers(2, 4), n_local=st.integers(1, 12), ignore_diagonal=st.booleans())
def test_each_pair_of_crops_counts_once(n_global: int, n_local: int, ignore_diagonal: bool) -> None:
    global_scale, local_scale = dino_pair_scales(n_global, n_local, ignore_diagonal)
    pairs = [(s, t) for s in range(n_global) for t in range(n_global) if not (ignore_diagonal and s == t)]
    assert global_scale + local_scale == pytest.approx(1)
    assert global_scale / local_scale == pytest.approx(len(pairs) / (n_global * n_local))


def test_a_schedule_wins_over_the_constant() -> None:
    assert weight_at(np.array([0.0, 2.0]), 7.0, 1) == 2.0
    assert weight_at(None, 7.0, 1) == 7.0
