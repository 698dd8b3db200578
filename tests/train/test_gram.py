"""When the Gram teacher changes, and which features the Gram loss compares."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinov3.train.gram import GramLifecycle, resize_patch_features, select_tokens, square_or_crop_grid


def lifecycle(**changes: object) -> GramLifecycle:
    section = {
        "use_loss": True,
        "ema_teacher": False,
        "ckpt": "weights.pth",
        "it_load_ema_teacher": -1,
        "rep_update": True,
        "update_frequency": 10,
        "it_first_update": 20,
        "max_updates": None,
    }
    return GramLifecycle.from_config(SimpleNamespace(**(section | changes)))


@given(
    frequency=st.integers(1, 12),
    first=st.integers(0, 40),
    limit=st.none() | st.integers(0, 4),
    start=st.integers(0, 80),
)
def test_updates_counted_on_resume_are_those_an_uninterrupted_run_has_done(
    frequency: int, first: int, limit: int | None, start: int
) -> None:
    gram = lifecycle(update_frequency=frequency, it_first_update=first, max_updates=limit)
    done = 0
    for iteration in range(start):
        done += gram.refreshes_after(iteration, done)
    assert gram.updates_before(start) == done


def test_the_7b_gram_stage_refreshes_every_10k_iterations_three_times() -> None:
    gram = lifecycle(update_frequency=10_000, it_first_update=1_010_000, max_updates=3)
    refreshed, done = [], 0
    for iteration in range(999_990, 1_060_000):
        if gram.refreshes_after(iteration, done):
            refreshed.append(iteration + 1)
            done += 1
    assert refreshed == [1_010_000, 1_020_000, 1_030_000]


def test_a_gram_teacher_from_the_ema_is_ready_after_its_iteration_only() -> None:
    gram = lifecycle(ckpt=None, it_load_ema_teacher=5, rep_update=False)
    assert [i for i in range(10) if gram.loads_ema_before(i)] == [5]
    assert not gram.initialized_before(5)
    assert gram.initialized_before(6)


def test_nothing_happens_without_a_separate_gram_teacher() -> None:
    for changes in ({"use_loss": False}, {"ema_teacher": True}):
        gram = lifecycle(it_load_ema_teacher=0, it_first_update=0, update_frequency=1, **changes)
        assert not gram.loads_ema_before(0)
        assert not gram.refreshes_after(0, 0)


def test_tokens_are_selected_by_the_students_mask() -> None:
    patches = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    masks = torch.tensor([[True, False, False, True], [False, False, False, False]])
    assert select_tokens(patches, masks, "all").shape == (2, 4, 3)
    assert torch.equal(select_tokens(patches, masks, "masked"), patches[0, [0, 3]])
    assert select_tokens(patches, masks, "unmasked").shape == (6, 3)
    with pytest.raises(ValueError, match="'some'.*masked"):
        select_tokens(patches, masks, "some")


def test_resizing_features_keeps_a_constant_map_and_the_row_major_order() -> None:
    ramp = torch.arange(4.0).repeat(4, 1)  # grows along the columns only
    resized = resize_patch_features(ramp.reshape(1, 16, 1), (4, 4), (2, 2), "bilinear", True).reshape(2, 2)
    assert torch.allclose(resized[0], resized[1])
    assert resized[0, 0] < resized[0, 1]
    constant = torch.full((1, 16, 3), 2.5)
    assert torch.allclose(
        resize_patch_features(constant, (4, 4), (3, 5), "bicubic", False), torch.full((1, 15, 3), 2.5)
    )


def test_patch_grid_of_a_crop_is_checked_against_the_number_of_patches() -> None:
    assert square_or_crop_grid(6, (32, 48), 16) == (2, 3)
    assert square_or_crop_grid(9, (32, 48), 16) == (3, 3)
    with pytest.raises(ValueError, match="7 patches fit neither"):
        square_or_crop_grid(7, (32, 48), 16)
