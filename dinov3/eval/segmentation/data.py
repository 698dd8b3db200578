"""Segmentation data: datasets from strings, an endless loader for training that resumes exactly, one for evaluation."""

from collections.abc import Callable, Iterator, Sized
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from dinov3 import distributed
from dinov3.data import DatasetWithEnumeratedTargets, make_dataset
from dinov3.data.registry import with_root
from dinov3.data.seeded import Draw, SeededCollate, SeededDataset
from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.transforms import (
    IGNORED,
    PairTransform,
    make_segmentation_eval_transforms,
    make_segmentation_train_transforms,
)
from dinov3.utils.device import default_device
from dinov3.utils.reproducibility import fix_random_seeds


def dataset_string(dataset: str, root: str) -> str:
    """`dataset` with `:root=<root>`, quoted where needed; as it is without a root, or if it has its own.

    Raises:
        ValueError: no dataset.
    """
    if not dataset:
        raise ValueError("datasets.train and datasets.val must name data sets, such as ADE20K:split=VAL")
    return with_root(dataset, root) if root else dataset


def make_train_dataset(config: SegmentationConfig) -> Dataset[Any]:
    """Items are (image [3, h, w], (index, label [1, h, w])), transformed for training.

    Raises:
        ValueError: images of different sizes can't form batches.
    """
    settings = config.transforms.train
    if settings.crop_size is None and not isinstance(settings.img_size, list | tuple) and config.bs > 1:
        raise ValueError(
            f"a batch of {config.bs} needs images of one size: set transforms.train.crop_size=[<height>,<width>]"
        )
    transform = make_segmentation_train_transforms(
        img_size=settings.img_size,
        random_img_size_ratio_range=settings.random_img_size_ratio_range,
        crop_size=settings.crop_size,
        flip_prob=settings.flip_prob,
        reduce_zero_label=config.eval.reduce_zero_label,
        mean=config.transforms.mean,
        std=config.transforms.std,
    )
    name = dataset_string(config.datasets.train, config.datasets.root)
    transform = CheckedLabels(transform, config.decoder_head.num_classes)
    return DatasetWithEnumeratedTargets(make_dataset(dataset_str=name, transforms=transform))


def make_eval_dataset(config: SegmentationConfig, *, img_size: Any, use_tta: bool) -> Dataset[Any]:
    """Items are (views [3, h, w], (index, label [1, H, W])) of the validation set."""
    transform = make_segmentation_eval_transforms(
        img_size=img_size,
        inference_mode=config.eval.mode,  # type: ignore[arg-type]  # checked there
        use_tta=use_tta,
        tta_ratios=config.transforms.eval.tta_ratios,
        mean=config.transforms.mean,
        std=config.transforms.std,
    )
    name = dataset_string(config.datasets.val, config.datasets.root)
    return DatasetWithEnumeratedTargets(make_dataset(dataset_str=name, transforms=transform))


class CheckedLabels:
    """A transform of pairs that refuses labels beyond the classes, which would fail on a GPU without a reason.

    Args:
        transform: gives (image, label).
        num_classes: K.
    """

    def __init__(self, transform: PairTransform, num_classes: int) -> None:
        self.transform = transform
        self.num_classes = num_classes

    def __call__(self, image: Any, label: Any) -> tuple[Any, Tensor]:
        """The pair.

        Raises:
            ValueError: a label that is neither a class nor 255.
        """
        image, mask = self.transform(image, label)
        wrong = mask[(mask >= self.num_classes) & (mask != IGNORED) | (mask < 0)]
        if len(wrong):
            raise ValueError(
                f"a label is {int(wrong[0])}, but there are {self.num_classes} classes, 0 to {self.num_classes - 1} "
                f"({IGNORED}: ignored): set decoder_head.num_classes, or eval.reduce_zero_label if labels count from 1"
            )
        return image, mask


def class_names(dataset: Any, num_classes: int) -> list[str]:
    """The names that a data set gives its classes; numbers where it has none."""
    names = getattr(getattr(dataset, "_dataset", dataset), "class_names", None) or []
    if len(names) > num_classes:
        raise ValueError(f"the data set names {len(names)} classes, decoder_head.num_classes is {num_classes}")
    return [*names, *(str(i) for i in range(len(names), num_classes))]


class EpochSampler(DistributedSampler[Any]):
    """This process's share of each epoch's permutation, as draws numbered from the start of the training.

    Args:
        dataset: all samples; the last ones of an epoch are filled up so that processes have equally many.
        batch_size: per process.
        seed: of the permutations, with the epoch.

    Attributes:
        skip: batches of the next epoch to leave out.
    """

    def __init__(self, dataset: Dataset[Any], *, batch_size: int, seed: int) -> None:
        super().__init__(
            dataset, num_replicas=distributed.get_world_size(), rank=distributed.get_rank(), shuffle=True, seed=seed
        )
        self.batch_size = batch_size
        self.skip = 0

    def __iter__(self) -> Iterator[Any]:
        samples = list(super().__iter__())
        first = self.epoch * -(-len(samples) // self.batch_size) * self.batch_size
        start, self.skip = self.skip * self.batch_size, 0
        for i in range(start, len(samples)):
            yield Draw(first + i, samples[i])


class InfiniteDataloader:
    """A loader that starts again, with the sampler's next epoch, when it is exhausted.

    Args:
        dataloader: its sampler may have an `epoch`, and a `skip` to start within one.
        start_iteration: batches to leave out.
    """

    def __init__(self, dataloader: DataLoader[Any], start_iteration: int = 0) -> None:
        if len(dataloader) == 0:
            raise ValueError("the loader has no batch: its data set is empty")
        self.dataloader = dataloader
        self.sampler = cast(Any, dataloader.sampler)
        self.sampler.epoch, skip = divmod(start_iteration, len(dataloader))
        if skip:
            self.sampler.skip = skip
        self.data_iterator = iter(dataloader)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.dataloader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self.data_iterator, None)
        if batch is None:
            self.sampler.epoch += 1
            self.data_iterator = iter(self.dataloader)
            batch = next(self.data_iterator)
        return batch


def worker_init_fn(worker_id: int, num_workers: int, rank: int, seed: int) -> None:
    """Seed NumPy, `random` and torch of a worker process: num_workers * rank + worker_id + seed + rank."""
    fix_random_seeds(num_workers * rank + worker_id + seed + rank)


def make_train_loader(
    dataset: Dataset[Any], *, batch_size: int, num_workers: int, seed: int, start_iteration: int = 0
) -> InfiniteDataloader:
    """Endless batches for training: every epoch a permutation of all samples, spread over the processes.

    Order and draws of the transforms are functions of (seed, rank, iteration, place in the batch), so the batches from
    `start_iteration` on are those of an uninterrupted training.
    """
    if batch_size < 1 or num_workers < 0:
        raise ValueError(f"need bs >= 1 and num_workers >= 0, got {batch_size} and {num_workers}")
    rank = distributed.get_rank()
    key: dict[str, Any] = {"draw_seed": seed, "rank": rank, "batch_size": batch_size}
    loader: DataLoader[Any] = DataLoader(
        SeededDataset(dataset, **key),
        sampler=EpochSampler(dataset, batch_size=batch_size, seed=seed),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=_pins_memory(),
        collate_fn=SeededCollate(None, **key),
        worker_init_fn=cast(
            Callable[[int], None], partial(worker_init_fn, num_workers=num_workers, rank=rank, seed=seed)
        ),
        generator=torch.Generator(),  # the workers' base seed doesn't come from the global one
    )
    return InfiniteDataloader(loader, start_iteration)


def make_eval_loader(dataset: Dataset[Any], *, num_workers: int) -> DataLoader[Any]:
    """This process's images one by one, every image in exactly one process: (views [1, 3, h, w], (index, label))."""
    n_images = len(cast(Sized, dataset))
    share = range(distributed.get_rank(), n_images, distributed.get_world_size())
    return DataLoader(
        Subset(dataset, share), batch_size=1, num_workers=min(num_workers, len(share)), pin_memory=_pins_memory()
    )


def _pins_memory() -> bool:
    return default_device().type not in ("cpu", "mps")
