"""Data sets and loaders of depth, from the configuration."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from dinov3 import distributed
from dinov3.data import DatasetWithEnumeratedTargets, SamplerType, make_data_loader, make_dataset
from dinov3.eval.data import dataset_string, make_endless_loader
from dinov3.eval.depth.config import DepthConfig
from dinov3.eval.depth.transforms import make_depth_eval_transforms, make_depth_train_transforms


def make_train_dataset(config: DepthConfig) -> Any:
    """The training set, with random changes.

    Raises:
        ValueError: no data set or no transforms in the configuration.
    """
    options = config.transforms.train
    if not config.datasets.train:
        raise ValueError("training needs datasets.train, such as DepthFolder:split=train:root=<folder>")
    if options is None:
        raise ValueError("training needs transforms.train, such as transforms.train.random_crop=[416,544]")
    transforms = make_depth_train_transforms(
        normalization_constant=config.transforms.normalization_constant,
        rotation_angle=options.rotation_angle,
        img_size=options.img_size,
        random_crop_size=options.random_crop,
        fixed_crop=options.fixed_crop,
        mean=config.transforms.mean,
        std=config.transforms.std,
        brightness_range=options.brightness_range,
    )
    return make_dataset(dataset_str=dataset_string(config.datasets.train, config.datasets.root), transforms=transforms)


def make_train_loader(dataset: Any, config: DepthConfig, *, done: int = 0) -> Any:
    """Endless batches (images `[bs, 3, H, W]`, depths `[bs, 1, H, W]`), a function of seed, rank and iteration.

    Args:
        dataset: of (image, depth).
        config: batch size, workers and seed.
        done: iterations that are done: the stream starts behind them.
    """
    return make_endless_loader(
        dataset,
        batch_size=config.bs,
        num_workers=config.num_workers,
        seed=config.seed,
        done=done,
        collate_fn=collate,
    )


def make_eval_loader(name: str, config: DepthConfig, *, tta: bool) -> Any:
    """Batches (images, (index, depths)) of a test set, spread over the processes; images and depths are lists of views.

    Every process gets equally many samples; those that fill up have the index -1.
    """
    transforms = make_depth_eval_transforms(
        normalization_constant=config.transforms.normalization_constant,
        img_size=config.transforms.eval.img_size,
        mean=config.transforms.mean,
        std=config.transforms.std,
        fixed_crop=config.transforms.eval.fixed_crop,
        tta=tta,
    )
    dataset = make_dataset(dataset_str=dataset_string(name, config.datasets.root), transforms=transforms)
    return make_data_loader(
        dataset=DatasetWithEnumeratedTargets(dataset, pad_dataset=True, num_replicas=distributed.get_world_size()),
        batch_size=config.eval.batch_size,
        num_workers=config.num_workers,
        shuffle=False,
        sampler_type=SamplerType.DISTRIBUTED,
        drop_last=False,
        persistent_workers=False,
        collate_fn=collate,
    )


def collate(samples: Sequence[Any]) -> Any:
    """Torch's, with an error that says what to do about images of several sizes."""
    sizes = sorted({tuple(x.shape[-2:]) for sample in samples for x in _tensors(sample)[:1]})
    if len(sizes) > 1:
        shown = ", ".join(f"{height} x {width}" for height, width in sizes)
        raise ValueError(
            f"a batch holds images of {shown} pixels: set transforms.train.random_crop (training) or "
            "transforms.eval.img_size=[height,width] (evaluation), or take batches of one (bs=1, eval.batch_size=1)"
        )
    return default_collate(list(samples))


def _tensors(sample: Any) -> list[Tensor]:
    """The tensors of nested sequences, in order."""
    if isinstance(sample, torch.Tensor):
        return [sample]
    return [x for item in sample for x in _tensors(item)] if isinstance(sample, list | tuple) else []
