"""From augmented samples to a training batch: crops stacked crop-major, iBOT masks drawn and indexed.

Owns the keys of the training batch. How one mask is drawn is `masking.py`; how crops are made is `augmentations.py`.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3.data.masking import MaskingGenerator

_MAX_SHUFFLES = 1000


def collate_data_and_cast(
    samples_list: Sequence[tuple[Mapping[str, Any], Any]],
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    dtype: torch.dtype,
    n_tokens: int | None = None,
    mask_generator: MaskingGenerator | None = None,
    random_circular_shift: bool = False,
    local_batch_size: int | None = None,
    *,
    python_rng: random.Random | None = None,
    numpy_rng: np.random.RandomState | None = None,
) -> dict[str, Any]:
    """Stack the crops of a batch and draw its masks.

    Of the B masks, `int(B * mask_probability)` get a ratio from equal steps over `mask_ratio_tuple`, the others are
    empty; then their order is shuffled.

    Args:
        samples_list: B0 pairs (output of `DataAugmentationDINO`, anything).
        mask_ratio_tuple: smallest and largest share of masked patches.
        mask_probability: share of the crops that are masked at all.
        dtype: of the crops.
        n_tokens: patches per global crop; None means the grid of the mask generator.
        mask_generator: draws the masks.
        random_circular_shift: roll each non-empty mask by random numbers of rows and columns.
        local_batch_size: images that this process trains on where that differs from B0 (multi-distillation): the
            number of masks is then `n_global_crops * local_batch_size`.
        python_rng, numpy_rng: generators to draw from; the global ones by default.

    Returns:
        A dict, with S crops of a kind per image, B = S * B0 (or S * `local_batch_size`) masks, N patches, M masked in
        all: `collated_global_crops` [S*B0, 3, G, G] and `collated_local_crops` [S*B0, 3, L, L], row `crop * B0 +
        sample`; `collated_gram_teacher_crops` [S*B0, 3, T, T] if the samples have them; `collated_masks` bool [B, N];
        `mask_indices_list` int64 [M], positions in the flattened masks; `masks_weight` float32 [M], one over the
        number of masked patches of that row; `upperbound`, the number of patches asked for; `n_masked_patches` int64
        [1]. With `augmentation="device"` crops keep their dtype, and `distortions` holds what is left to do.

    Raises:
        ValueError: empty batch, no mask generator, `n_tokens` that is not the generator's, samples that differ in
            crops.
    """
    if len(samples_list) == 0:
        raise ValueError("cannot collate an empty batch: samples_list has no items")
    if mask_generator is None:
        raise ValueError(
            "collate_data_and_cast needs a mask_generator, e.g. MaskingGenerator((14, 14)) for 224 px / 16"
        )
    if n_tokens is not None and n_tokens != mask_generator.num_patches:
        raise ValueError(
            f"n_tokens is {n_tokens}, but the mask generator draws {mask_generator.height} x {mask_generator.width} = "
            f"{mask_generator.num_patches} patches: both must follow from crop size // patch size"
        )
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    crops = [sample[0] for sample in samples_list]
    n_global_crops = len(crops[0]["global_crops"])
    batch_size = n_global_crops * (len(crops) if local_batch_size is None else local_batch_size)

    batch: dict[str, Any] = {
        "collated_global_crops": _stack_crops(crops, "global_crops"),
        "collated_local_crops": _stack_crops(crops, "local_crops"),
    }
    if "gram_teacher_crops" in crops[0]:
        batch["collated_gram_teacher_crops"] = _stack_crops(crops, "gram_teacher_crops")
    if "distortions" in crops[0]:  # still grey levels, which `DeviceAugmentation` will cast
        batch["distortions"] = {kind: _stack_distortions(crops, kind) for kind in ("global", "local")}
    else:
        batch = {key: stacked.to(dtype) for key, stacked in batch.items()}
    masks, upperbound = _draw_masks(
        batch_size, mask_ratio_tuple, mask_probability, mask_generator, random_circular_shift, python_rng, numpy_rng
    )
    batch |= _mask_entries(masks)
    batch["upperbound"] = upperbound
    return batch


def get_batch_subset(
    collated_data_batch: Mapping[str, Any],
    divide_by: int,
    *,
    n_global_crops: int = 2,
    python_rng: random.Random | None = None,
) -> dict[str, Any]:
    """The first part of a batch, for a student that trains on fewer images than the teacher sees (multi-distillation).

    Of b images, the first `ceil(b / divide_by)` are kept in every crop group; of b' masks per global crop, the first
    `b' // divide_by`. (b and b' differ when the batch was collated with a `local_batch_size`, hence two roundings.)
    If no kept mask has an entry but others do, the rows are shuffled until one has.

    Args:
        collated_data_batch: output of `collate_data_and_cast`, possibly with `global_batch_size` added. Not changed.
        divide_by: how many times smaller the result is.
        n_global_crops: global crops per image.
        python_rng: generator of the shuffles; the global one by default.

    Returns:
        The same keys; `upperbound` is kept, `global_batch_size` is divided by `divide_by` (rounding down).

    Raises:
        ValueError: if no mask would be left, or a group of crops is not a multiple of the number of images.
    """
    if divide_by < 1:
        raise ValueError(f"divide_by must be at least 1, got {divide_by}")
    masks: Tensor = collated_data_batch["collated_masks"]
    n_images = _per_group(collated_data_batch["collated_global_crops"], n_global_crops, "collated_global_crops")
    n_masks = _per_group(masks, n_global_crops, "collated_masks")
    if n_masks < divide_by:
        raise ValueError(f"{n_masks} masks per global crop cannot be divided by {divide_by}: use a larger batch")
    kept_images = -(-n_images // divide_by)

    subset = dict(collated_data_batch)
    for key in ("collated_global_crops", "collated_local_crops", "collated_gram_teacher_crops"):
        if key in subset:
            subset[key] = _first_of_each_group(subset[key], n_images, kept_images, key)
    subset |= _mask_entries(_subset_masks(masks, n_masks, n_masks // divide_by, python_rng))
    if "global_batch_size" in subset:
        subset["global_batch_size"] //= divide_by
    return subset


def split_batch(
    collated_data_batch: Mapping[str, Any], n_parts: int, *, n_global_crops: int = 2
) -> list[dict[str, Any]]:
    """The batch as `n_parts` batches of equally many images each, in order (gradient accumulation).

    Args:
        collated_data_batch: output of `collate_data_and_cast`. Not changed.
        n_parts: how many; 1 gives the batch itself.
        n_global_crops: global crops per image.

    Raises:
        ValueError: the number of images is not a multiple of `n_parts`.
    """
    if n_parts == 1:
        return [dict(collated_data_batch)]
    n_images = _per_group(collated_data_batch["collated_global_crops"], n_global_crops, "collated_global_crops")
    if n_parts < 1 or n_images % n_parts:
        raise ValueError(f"a batch of {n_images} images cannot be split into {n_parts} equal parts")
    crop_keys = ("collated_global_crops", "collated_local_crops", "collated_gram_teacher_crops", "collated_masks")
    parts = []
    for i in range(n_parts):
        images = slice(i * n_images // n_parts, (i + 1) * n_images // n_parts)
        part = dict(collated_data_batch)
        for key in crop_keys:
            if key in part:
                part[key] = part[key].unflatten(0, (-1, n_images))[:, images].flatten(0, 1)
        parts.append(part | _mask_entries(part["collated_masks"]))
    return parts


def _stack_crops(crops: Sequence[Mapping[str, Any]], key: str) -> Tensor:
    """[n_crops * B0, 3, H, W], all first crops before all second ones."""
    n_crops = len(crops[0][key])
    if any(len(sample[key]) != n_crops for sample in crops):
        raise ValueError(f"samples differ in their number of {key}: {[len(sample[key]) for sample in crops]}")
    if n_crops == 0:  # no local crops at all
        return crops[0]["global_crops"][0].new_empty(0, 3, 0, 0)
    return torch.stack([sample[key][i] for i in range(n_crops) for sample in crops])


def _stack_distortions(crops: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Tensor]:
    """Parameters with one row per crop, in the order of `_stack_crops`."""
    rows = [sample["distortions"][kind] for sample in crops]
    return {name: torch.stack([row[name] for row in rows], dim=1).flatten(0, 1) for name in rows[0]}


def _draw_masks(
    batch_size: int,
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    generate: MaskingGenerator,
    random_circular_shift: bool,
    python_rng: random.Random | None,
    numpy_rng: np.random.RandomState | None,
) -> tuple[Tensor, int]:
    """The masks, bool [batch_size, N] in random order, and the number of entries asked for."""
    low, high = mask_ratio_tuple
    if not 0 <= low <= high <= 1:
        raise ValueError(f"mask_ratio_tuple must be 0 <= low <= high <= 1, got {mask_ratio_tuple}")
    if not 0 <= mask_probability <= 1:
        raise ValueError(f"mask_probability must lie in [0, 1], got {mask_probability}")
    rng: random.Random = python_rng or random  # type: ignore[assignment]
    n_masked = int(batch_size * mask_probability)
    # float32 ratios and products, truncated: the rounding of the published training code.
    ratios = torch.linspace(low, high, n_masked + 1)
    counts = [int(generate.num_patches * ratio) for ratio in ratios[1:]] + [0] * (batch_size - n_masked)
    masks = []
    for i, count in enumerate(counts):
        mask = generate(count, python_rng=python_rng, numpy_rng=numpy_rng)
        if random_circular_shift and i < n_masked:
            rows = rng.randint(0, generate.height - 1)
            columns = rng.randint(0, generate.width - 1)
            mask = np.roll(mask, (rows, columns), (0, 1))
        masks.append(mask)
    rng.shuffle(masks)
    return torch.from_numpy(np.stack(masks)).flatten(1), sum(counts)


def _mask_entries(masks: Tensor) -> dict[str, Tensor]:
    """The entries of a batch that follow from its masks [B, N]."""
    indices = masks.flatten().nonzero().flatten()
    per_row = 1 / masks.sum(dim=1).clamp(min=1).float()
    return {
        "collated_masks": masks,
        "mask_indices_list": indices,
        "masks_weight": per_row[indices // masks.shape[1]],
        "n_masked_patches": torch.full((1,), indices.numel(), dtype=torch.long),
    }


def _per_group(rows: Tensor, n_groups: int, key: str) -> int:
    if rows.shape[0] % n_groups:
        raise ValueError(f"{key} has {rows.shape[0]} rows, which is not a multiple of {n_groups} global crops")
    return rows.shape[0] // n_groups


def _first_of_each_group(rows: Tensor, group_size: int, kept: int, key: str) -> Tensor:
    if rows.shape[0] % group_size:
        raise ValueError(
            f"{key} has {rows.shape[0]} rows, which is not a multiple of the {group_size} images of the batch"
        )
    return rows.unflatten(0, (-1, group_size))[:, :kept].flatten(0, 1)


def _subset_masks(masks: Tensor, group_size: int, kept: int, python_rng: random.Random | None) -> Tensor:
    """The first `kept` masks of each group; rows are shuffled while those are empty but the batch is not."""
    subset = _first_of_each_group(masks, group_size, kept, "collated_masks")
    if not masks.any():
        return subset
    rng: random.Random = python_rng or random  # type: ignore[assignment]
    rows = list(range(masks.shape[0]))
    for _ in range(_MAX_SHUFFLES):
        if subset.any():
            return subset
        rng.shuffle(rows)
        subset = _first_of_each_group(masks[rows], group_size, kept, "collated_masks")
    # Practically out of reach; ends the loop in any case.
    return masks[masks.any(dim=1).argsort(descending=True, stable=True)[: subset.shape[0]]]
