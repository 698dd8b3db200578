import random
from typing import Any

import numpy as np
import pytest
import torch

from dinov3.data import MaskingGenerator, collate_data_and_cast
from dinov3.data.collate import get_batch_subset


def make_samples(batch: int, n_local: int = 3, gram: bool = False) -> list[tuple[dict[str, Any], tuple[()]]]:
    """Crops filled with 100 * kind + 10 * crop + sample, so that their place in the batch can be read off."""

    def crops(kind: int, sample: int, count: int, side: int) -> list[torch.Tensor]:
        return [torch.full((3, side, side), 100.0 * kind + 10 * crop + sample) for crop in range(count)]

    samples = []
    for sample in range(batch):
        augmented = {"global_crops": crops(1, sample, 2, 8), "local_crops": crops(2, sample, n_local, 4)}
        if gram:
            augmented["gram_teacher_crops"] = crops(3, sample, 2, 12)
        samples.append((augmented, ()))
    return samples


def collate(samples: list[Any], **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "mask_ratio_tuple": (0.1, 0.5),
        "mask_probability": 0.5,
        "dtype": torch.float32,
        "n_tokens": 16,
        "mask_generator": MaskingGenerator((4, 4)),
    }
    return collate_data_and_cast(samples, **(options | changes))


def test_crops_are_stacked_crop_major_and_cast() -> None:
    batch = collate(make_samples(3, gram=True), dtype=torch.bfloat16)
    assert batch["collated_global_crops"][:, 0, 0, 0].tolist() == [100, 101, 102, 110, 111, 112]
    assert batch["collated_local_crops"][:, 0, 0, 0].tolist() == [200, 201, 202, 210, 211, 212, 220, 221, 222]
    assert batch["collated_gram_teacher_crops"].shape == (6, 3, 12, 12)
    assert {batch[key].dtype for key in batch if key.endswith("crops")} == {torch.bfloat16}
    assert "collated_gram_teacher_crops" not in collate(make_samples(3))


def test_mask_entries_agree_with_the_masks() -> None:
    batch = collate(make_samples(8), mask_probability=0.75)
    masks = batch["collated_masks"]
    counts = masks.sum(1)
    assert sorted(counts.tolist())[:4] == [0] * 4
    assert (counts > 0).sum() == 12
    assert torch.equal(masks.flatten()[batch["mask_indices_list"]], torch.ones(int(counts.sum()), dtype=torch.bool))
    assert batch["n_masked_patches"].tolist() == [int(counts.sum())] == [batch["upperbound"]]
    # Every masked image weighs one in all.
    per_row = torch.zeros(16).index_add(0, batch["mask_indices_list"] // 16, batch["masks_weight"])
    torch.testing.assert_close(per_row, (counts > 0).float())


def test_mask_sizes_step_evenly_through_the_ratios() -> None:
    batch = collate(make_samples(4), mask_probability=0.5, mask_ratio_tuple=(0.25, 0.75))
    assert sorted(batch["collated_masks"].sum(1).tolist()) == [0, 0, 0, 0, 6, 8, 10, 12]


def test_local_batch_size_sets_the_number_of_masks() -> None:
    batch = collate(make_samples(2), local_batch_size=5)
    assert batch["collated_global_crops"].shape[0] == 4
    assert batch["collated_masks"].shape == (10, 16)


def test_no_masks_and_no_local_crops_are_possible() -> None:
    batch = collate(make_samples(2, n_local=0), mask_probability=0.0)
    assert batch["mask_indices_list"].numel() == batch["masks_weight"].numel() == batch["upperbound"] == 0
    assert batch["collated_local_crops"].shape[0] == 0


class FixedMask(MaskingGenerator):
    """Always masks the top left patch."""

    def __call__(self, num_masking_patches: int = 0, **_: Any) -> np.ndarray:
        return np.arange(self.num_patches).reshape(self.height, self.width) < bool(num_masking_patches)


def test_the_circular_shift_rolls_each_mask_by_drawn_rows_and_columns() -> None:
    batch = collate(
        make_samples(3),
        mask_probability=0.7,
        mask_generator=FixedMask((4, 4)),
        random_circular_shift=True,
        python_rng=random.Random(8),
    )
    twin = random.Random(8)
    expected = [4 * twin.randint(0, 3) + twin.randint(0, 3) for _ in range(4)] + [None, None]
    twin.shuffle(expected)
    places = [mask.nonzero().item() if mask.any() else None for mask in batch["collated_masks"]]
    assert places == expected


def test_own_generators_replace_the_global_ones() -> None:
    random.seed(1)
    np.random.seed(2)
    expected = collate(make_samples(4), random_circular_shift=True)
    state = random.getstate()
    own = {"python_rng": random.Random(1), "numpy_rng": np.random.RandomState(2)}
    got = collate(make_samples(4), random_circular_shift=True, **own)
    assert torch.equal(expected["collated_masks"], got["collated_masks"])
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("samples", "changes", "message"),
    [
        ([], {}, "empty batch"),
        (make_samples(2), {"mask_generator": None}, "needs a mask_generator"),
        (make_samples(2), {"n_tokens": 15}, r"n_tokens is 15, but the mask generator draws 4 x 4 = 16"),
        (make_samples(2), {"mask_ratio_tuple": (0.5, 0.1)}, "mask_ratio_tuple"),
        (make_samples(2), {"mask_probability": 1.5}, "mask_probability"),
        (
            make_samples(1, n_local=2) + make_samples(1, n_local=3),
            {},
            r"differ in their number of local_crops: \[2, 3\]",
        ),
    ],
)
def test_bad_input_is_refused(samples: list[Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate(samples, **changes)


def test_a_dtype_by_name_is_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.dtype, got 'float32'"):
        collate(make_samples(1), dtype="float32")


def test_a_subset_keeps_the_first_images_of_every_group() -> None:
    batch = {**collate(make_samples(5, gram=True), mask_probability=1.0), "global_batch_size": 20}
    subset = get_batch_subset(batch, 2)
    assert subset["collated_global_crops"][:, 0, 0, 0].tolist() == [100, 101, 102, 110, 111, 112]
    assert subset["collated_local_crops"].shape[0] == 9
    assert subset["collated_gram_teacher_crops"][:, 0, 0, 0].tolist() == [300, 301, 302, 310, 311, 312]
    assert torch.equal(subset["collated_masks"], batch["collated_masks"][[0, 1, 5, 6]])
    assert subset["n_masked_patches"].item() == int(subset["collated_masks"].sum()) == subset["masks_weight"].numel()
    assert subset["upperbound"] == batch["upperbound"]
    assert (subset["global_batch_size"], batch["global_batch_size"]) == (10, 20)


def test_a_subset_shuffles_until_something_is_masked() -> None:
    batch = collate(make_samples(8))
    masks = torch.zeros(16, 16, dtype=torch.bool)
    masks[7, :3] = True  # not among the first of a group
    subset = get_batch_subset({**batch, "collated_masks": masks}, 4)
    assert subset["n_masked_patches"].item() == 3
    assert not masks[0].any()  # the batch itself stays


def test_a_subset_of_a_batch_without_masks_ends() -> None:
    subset = get_batch_subset(collate(make_samples(4), mask_probability=0.0), 2)
    assert subset["n_masked_patches"].item() == 0


def test_a_subset_without_a_mask_left_is_refused() -> None:
    with pytest.raises(ValueError, match="2 masks per global crop cannot be divided by 3"):
        get_batch_subset(collate(make_samples(2)), 3)
