"""Training data loaders from a configuration."""

import copy
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from dinov3 import distributed
from dinov3.data import (
    CombinedDataLoader,
    MaskingGenerator,
    SamplerType,
    collate_data_and_cast,
    make_data_loader,
    make_dataset,
)
from dinov3.data.datasets.skipped import SkippedFiles
from dinov3.data.device_augmentation import DeviceAugmentation, DeviceAugmentedLoader
from dinov3.data.meta_loaders import choices
from dinov3.train.meta_arch import MetaArch
from dinov3.utils.device import default_device
from dinov3.utils.dtype import dtype_dict, resolve_compute_dtype

CROP_KEYS = ("global_crops_size", "local_crops_size", "gram_teacher_crops_size", "global_local_crop_pairs_ratios")


def _no_target(_: Any) -> tuple[()]:
    return ()


def build_data_loader_from_cfg(cfg: Any, model: MetaArch, start_iter: int) -> Iterable[Any]:
    """The loader of one resolution, positioned at `start_iter`.

    The order of the data, crops and masks depend on `train.seed`, the iteration, the sample and the rank only.
    """
    multi = bool(cfg.multidistillation.enabled)
    world, subgroup = distributed.get_world_size(), distributed.get_subgroup_size()
    batch_size, local_batch_size = cfg.train.batch_size_per_gpu, None
    if multi:
        total = cfg.multidistillation.global_batch_size
        batch_size, local_batch_size = -(-total // world), total // subgroup

    augmentation = model.build_data_augmentation_dino(cfg)
    dataset = make_dataset(
        dataset_str=cfg.train.dataset_path,
        transform=augmentation,
        target_transform=_no_target,
    )
    if isinstance(getattr(dataset, "skipped", None), SkippedFiles):
        dataset.skipped.move_to(Path(cfg.train.output_dir) / "skipped_files.jsonl")
    sharded = cfg.train.cache_dataset and not isinstance(dataset, IterableDataset)
    loader = make_data_loader(
        dataset=dataset,
        batch_size=batch_size,
        num_workers=cfg.train.num_workers,
        shuffle=True,
        seed=cfg.train.seed + 1,
        sampler_type=SamplerType.SHARDED_INFINITE if sharded else SamplerType.INFINITE,
        drop_last=True,
        collate_fn=_build_collate(cfg, local_batch_size),
        draw_seed=cfg.train.seed,
        start_iteration=start_iter,
    )
    if augmentation.augmentation != "device":
        return loader
    return DeviceAugmentedLoader(
        loader, DeviceAugmentation(augmentation, device=default_device(), dtype=compute_dtype(cfg))
    )


def compute_dtype(cfg: Any) -> torch.dtype:
    """The dtype of batches, forward and backward on this machine's device."""
    return resolve_compute_dtype(dtype_dict[cfg.compute_precision.param_dtype], default_device())


def _build_collate(cfg: Any, local_batch_size: int | None) -> partial[dict[str, Any]]:
    size = cfg.crops.global_crops_size
    patch_size = int(cfg.student.patch_size * cfg.crops.teacher_to_student_resolution_scale)
    grid = size // patch_size
    return partial(
        collate_data_and_cast,
        mask_ratio_tuple=tuple(cfg.ibot.mask_ratio_min_max),
        mask_probability=cfg.ibot.mask_sample_probability,
        dtype=compute_dtype(cfg),
        n_tokens=grid**2,
        mask_generator=MaskingGenerator(
            input_size=(grid, grid), max_num_patches=0.5 * size // patch_size * size // patch_size
        ),
        random_circular_shift=cfg.ibot.mask_random_circular_shift,
        local_batch_size=local_batch_size,
    )


def build_multi_resolution_data_loader_from_cfg(
    cfg: Any, model: MetaArch, start_iter: int, seed: int = 65537
) -> Iterable[Any]:
    """One loader per entry of the crop-size lists, mixed by their ratios; every rank draws the same resolution.

    Scalars count as lists of one entry; then that loader itself is returned. Each loader continues after the batches
    that were drawn from it in the first `start_iter` iterations.

    Raises:
        ValueError: the lists differ in length.
    """
    entries = resolution_entries(cfg.crops)
    ratios = [entry["global_local_crop_pairs_ratios"] for entry in entries]
    drawn = np.bincount(choices(seed, ratios, start_iter), minlength=len(entries))
    loaders: list[Any] = []
    for i, entry in enumerate(entries):
        one = copy.deepcopy(cfg)
        one.crops.update(entry)
        one.train.seed += i + 1
        loaders.append(build_data_loader_from_cfg(one, model, int(drawn[i])))
    if len(loaders) == 1:
        return loaders[0]
    return CombinedDataLoader(
        zip(loaders, ratios, strict=True),
        batch_size=loaders[0].batch_size,
        combining_mode=CombinedDataLoader.GLOBAL_HOMOGENEOUS,
        seed=seed,
        name="MultiResDL",
        start_iteration=start_iter,
    )


def resolution_entries(crops: Any) -> list[dict[str, Any]]:
    """The crop sizes and ratio of each resolution, from equal-length lists (a scalar or null is a list of one)."""
    columns = {key: _as_list(crops[key]) for key in CROP_KEYS}
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"crops.{key}: {len(column)}" for key, column in columns.items())
        raise ValueError(f"Crop sizes and ratios must be lists of equal length, got {lengths}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _as_list(value: Any) -> list[Any]:
    return [value] if value is None or isinstance(value, int | float) else list(value)
