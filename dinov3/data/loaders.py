"""Datasets from strings, and loaders over them.

Owns which sampler serves which purpose, and exact continuation (`draw_seed`, `start_iteration`).
"""

import logging
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from dinov3 import distributed
from dinov3.data.datasets.skipped import ReportingIterator, SkippedFiles
from dinov3.data.registry import build_dataset, entry_of, parse_dataset_str
from dinov3.data.samplers import EpochSampler, InfiniteSampler, ShardedInfiniteSampler
from dinov3.data.seeded import PositionedSampler, SeededCollate, SeededDataset
from dinov3.utils.device import default_device

logger = logging.getLogger("dinov3")


class SamplerType(Enum):
    """Which order a loader takes the samples in."""

    DISTRIBUTED = 0
    EPOCH = 1
    INFINITE = 2
    SHARDED_INFINITE = 3
    SHARDED_INFINITE_NEW = 4


_ENDLESS = (SamplerType.INFINITE, SamplerType.SHARDED_INFINITE, SamplerType.SHARDED_INFINITE_NEW)


def _parse_dataset_str(dataset_str: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The class and the arguments of a dataset string; see `dinov3.data.registry`."""
    name, kwargs = parse_dataset_str(dataset_str)
    return entry_of(name).build, kwargs


def make_dataset(
    *,
    dataset_str: str,
    transform: Callable[..., Any] | None = None,
    target_transform: Callable[..., Any] | None = None,
    transforms: Callable[..., Any] | None = None,
) -> Any:
    """The dataset that a string names, e.g. `ImageNet:split=TRAIN:root=<DIR>:extra=<DIR>` or `ImageFolder:root=<DIR>`.

    Args:
        dataset_str: name and keys; see `dinov3.data.registry`.
        transform, target_transform: applied to the image, to the target; or
        transforms: applied to both.

    Returns:
        A map-style dataset with the attributes `transform`, `target_transform` and `transforms`.

    Raises:
        ValueError: unknown name, or a part that isn't `key=value`. AssertionError: unknown key. KeyError: unknown
            split.
        TypeError: a key that the dataset doesn't take, or a required one that is missing.
    """
    logger.info(f'using dataset: "{dataset_str}"')
    dataset = build_dataset(dataset_str, transform=transform, target_transform=target_transform, transforms=transforms)
    for name, value in (("transform", transform), ("target_transform", target_transform), ("transforms", transforms)):
        if not hasattr(dataset, name):
            setattr(dataset, name, value)
    return dataset


def make_data_loader(
    *,
    dataset: Dataset[Any],
    batch_size: int,
    num_workers: int,
    shuffle: bool = True,
    seed: int = 0,
    sampler_type: SamplerType | None = SamplerType.INFINITE,
    sampler_size: int = -1,
    sampler_advance: int = 0,
    drop_last: bool = True,
    persistent_workers: bool = False,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    worker_init_fn: Callable[[int], None] | None = None,
    draw_seed: int | None = None,
    start_iteration: int = 0,
) -> DataLoader[Any]:
    """A loader over this process's share of a dataset; memory is pinned where there is an accelerator that can use it.

    Args:
        dataset: map-style, or iterable (then `sampler_type` has no effect).
        batch_size: samples per batch of this process.
        num_workers: processes that load; 0: this one.
        shuffle: random order. Without a sampler (`sampler_type=None`) the order is that of the dataset in any case.
        seed: of the order.
        sampler_type: order of the samples, see `dinov3.data.samplers`.
        sampler_size: indices per epoch of `EPOCH`; not positive: the dataset's length.
        sampler_advance: leave out samples at the start, by the rule of the published code (endless samplers).
        drop_last: leave out an incomplete last batch.
        persistent_workers: keep workers between epochs.
        collate_fn, worker_init_fn: as for torch's loader.
        draw_seed: make all random draws of samples and batches functions of (draw_seed, rank, iteration, place in the
            batch), whatever the number of workers, and leave the global generators alone (see `dinov3.data.seeded`).
        start_iteration: start where an uninterrupted loader would be after so many batches. With `draw_seed`, batches
            from there on are equal to those of the uninterrupted loader.

    Raises:
        ValueError: a size or advance that the sampler doesn't have, `draw_seed` or `start_iteration` with a sampler
            that ends or an iterable dataset, bad sizes. NotImplementedError: `sampler_advance` with `EPOCH`.
    """
    if batch_size < 1 or num_workers < 0 or start_iteration < 0:
        raise ValueError(
            "need batch_size >= 1, num_workers >= 0 and start_iteration >= 0, got "
            f"{batch_size}, {num_workers} and {start_iteration}"
        )
    exact = draw_seed is not None or start_iteration > 0
    is_iterable = isinstance(dataset, IterableDataset)
    if exact and (is_iterable or sampler_type not in _ENDLESS):
        what = f"the iterable dataset {type(dataset).__name__}" if is_iterable else f"sampler_type={sampler_type}"
        raise ValueError(
            f"draw_seed and start_iteration need a map-style dataset and an endless sampler "
            f"({', '.join(kind.name for kind in _ENDLESS)}), got {what}"
        )
    sampler = None
    if not is_iterable:
        sampler = _make_sampler(
            dataset,
            sampler_type,
            shuffle=shuffle,
            seed=seed,
            size=sampler_size,
            advance=sampler_advance,
            skip=start_iteration * batch_size,
        )
    skipped: SkippedFiles | None = getattr(dataset, "skipped", None)
    if skipped is not None and not skipped.is_temporary and not distributed.is_main_process():
        skipped = None  # all processes write to one file, one tells what is in it
    generator = None
    if draw_seed is not None:
        key = {"draw_seed": draw_seed, "rank": distributed.get_rank(), "batch_size": batch_size}
        sampler = PositionedSampler(sampler, first_position=start_iteration * batch_size)  # type: ignore[arg-type]
        dataset, collate_fn = SeededDataset(dataset, **key), SeededCollate(collate_fn, **key)
        generator = torch.Generator()  # torch takes the workers' base seed from it, instead of from the global one
    device = default_device()
    return _Loader(
        dataset,
        sampler=sampler,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=device.type not in ("cpu", "mps"),  # MPS shares the CPU's memory
        drop_last=drop_last,
        persistent_workers=persistent_workers and num_workers > 0,
        collate_fn=collate_fn,
        worker_init_fn=worker_init_fn,
        generator=generator,
        skipped=skipped,
    )


class _Loader(DataLoader[Any]):
    """A loader that logs which samples its dataset skipped."""

    def __init__(self, *args: Any, skipped: SkippedFiles | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skipped = skipped

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return batches if self.skipped is None else ReportingIterator(batches, self.skipped)


def _make_sampler(
    dataset: Dataset[Any],
    kind: SamplerType | None,
    *,
    shuffle: bool,
    seed: int,
    size: int,
    advance: int,
    skip: int,
) -> Sampler[Any] | None:
    if kind is None:
        if shuffle:
            logger.warning("shuffle=True has no effect without a sampler: samples come in the order of the dataset")
        return None
    sample_count = len(dataset)  # type: ignore[arg-type]
    if size > 0 and kind is not SamplerType.EPOCH:
        raise ValueError(f"sampler_size {size} is only for SamplerType.EPOCH, got SamplerType.{kind.name}")
    if kind in _ENDLESS:
        common: dict[str, Any] = dict(sample_count=sample_count, shuffle=shuffle, seed=seed, advance=advance, skip=skip)
        if kind is SamplerType.INFINITE:
            return InfiniteSampler(**common)
        return ShardedInfiniteSampler(**common, use_new_shuffle_tensor_slice=kind is SamplerType.SHARDED_INFINITE_NEW)
    if kind is SamplerType.EPOCH:
        if advance > 0:
            raise NotImplementedError(f"sampler_advance {advance} is not possible with SamplerType.EPOCH")
        return EpochSampler(
            size=size if size > 0 else sample_count, sample_count=sample_count, shuffle=shuffle, seed=seed
        )
    if kind is SamplerType.DISTRIBUTED:
        if advance > 0:
            raise ValueError(f"sampler_advance {advance} is not possible with SamplerType.DISTRIBUTED")
        return DistributedSampler(
            dataset,
            num_replicas=distributed.get_world_size(),
            rank=distributed.get_rank(),
            shuffle=shuffle,
            seed=seed,
            drop_last=False,
        )
    raise ValueError(f"unknown sampler_type {kind!r}; known: {', '.join(member.name for member in SamplerType)}")
