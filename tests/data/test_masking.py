import random

import numpy as np
import pytest

from dinov3.data import MaskingGenerator


@pytest.mark.parametrize("shape", [(14, 14), (10, 6), (1, 1), (1, 9), (3, 2), (32, 32)])
@pytest.mark.parametrize("min_num_patches", [1, 4, 16])
def test_a_mask_has_exactly_the_requested_count(shape: tuple[int, int], min_num_patches: int) -> None:
    generate = MaskingGenerator(shape, min_num_patches=min_num_patches)
    total = shape[0] * shape[1]
    for count in {0, 1, total // 3, total // 2, total - 1, total}:
        mask = generate(count)
        assert mask.shape == shape
        assert mask.dtype == bool
        assert mask.sum() == count


def test_defaults_work_without_further_arguments() -> None:
    generate = MaskingGenerator(6)
    assert generate.get_shape() == (6, 6)
    assert generate.max_num_patches == 36
    assert generate(20).sum() == 20
    assert "6, 6" in repr(generate)


def test_blocks_are_limited_by_num_masking_patches_without_a_maximum() -> None:
    assert MaskingGenerator(14, num_masking_patches=75).max_num_patches == 75
    assert MaskingGenerator(14, num_masking_patches=75, max_num_patches=98.0).max_num_patches == 98.0


def test_masks_are_made_of_blocks() -> None:
    # Neighbours agree far more often than among as many patches drawn one by one.
    def neighbours_alike(masks: np.ndarray) -> float:
        return float((masks[:, 1:] == masks[:, :-1]).mean())

    generate = MaskingGenerator(16, max_num_patches=64)
    blocks = np.stack([generate(64) for _ in range(50)])
    single = np.random.default_rng(0).permuted(blocks.reshape(50, -1), axis=1).reshape(blocks.shape)
    assert neighbours_alike(blocks) > neighbours_alike(single) + 0.15


def test_own_generators_give_the_masks_of_equally_seeded_global_ones_and_leave_those_alone() -> None:
    generate = MaskingGenerator((9, 7), min_num_patches=2)
    random.seed(5)
    np.random.seed(6)
    expected = [generate(count) for count in (10, 0, 40)]

    before = random.getstate(), np.random.get_state()[1].tolist()
    own = {"python_rng": random.Random(5), "numpy_rng": np.random.RandomState(6)}
    got = [generate(count, **own) for count in (10, 0, 40)]
    assert all(np.array_equal(a, b) for a, b in zip(expected, got, strict=True))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_numpy_is_drawn_from_even_when_nothing_is_asked_for() -> None:
    generate = MaskingGenerator((4, 4))
    rng, twin = np.random.RandomState(0), np.random.RandomState(0)
    generate(0, numpy_rng=rng)
    twin.permutation(16)
    assert rng.rand() == twin.rand()


@pytest.mark.parametrize("count", [-1, 37])
def test_impossible_counts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"between 0 and 36 .*6 x 6.* got {count}"):
        MaskingGenerator(6)(count)


@pytest.mark.parametrize("kwargs", [{"input_size": 0}, {"input_size": (3, 0)}, {"input_size": 4, "min_aspect": 0.0}])
def test_impossible_grids_and_aspects_are_refused(kwargs: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="at least one patch|min_aspect"):
        MaskingGenerator(**kwargs)  # type: ignore[arg-type]
