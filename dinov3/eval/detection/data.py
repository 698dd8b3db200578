"""Data sets and loaders of detection, from the configuration."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov3 import distributed
from dinov3.data import make_dataset
from dinov3.data.datasets import CocoDetection
from dinov3.eval.data import dataset_string, make_endless_loader
from dinov3.eval.detection.inference import View, Views
from dinov3.eval.detection.recipe import DetectionConfig
from dinov3.eval.detection.transforms import make_train_transform
from dinov3.eval.detection.util.box_ops import box_xyxy_to_cxcywh


@dataclass(frozen=True)
class Batch:
    """Images `[3, H, W]` of several sizes with their objects: labels `[n]` and boxes `[n, 4]`, xyxy in pixels."""

    images: list[Tensor]
    labels: list[Tensor]
    boxes: list[Tensor]

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(*([x.to(device, non_blocking=True) for x in part] for part in vars(self).values()))

    def pin_memory(self) -> "Batch":
        """The same in pinned memory; called by the loader."""
        return Batch(*([x.pin_memory() for x in part] for part in vars(self).values()))

    def targets(self, *, absolute: bool) -> list[dict[str, Tensor]]:
        """What the losses compare with: `labels`, and `boxes` cxcywh, in pixels or relative to each image."""
        found = []
        for image, labels, boxes in zip(self.images, self.labels, self.boxes, strict=True):
            height, width = image.shape[-2:]
            scale = boxes.new_tensor([1.0] * 4 if absolute else [width, height, width, height])
            found.append({"labels": labels, "boxes": box_xyxy_to_cxcywh(boxes) / scale})
        return found


@dataclass(frozen=True)
class EvalItem:
    """An image of a test set.

    Attributes:
        index: of the sample.
        image_id: of the image.
        size: (height, width) [pixels].
        views: what the detector sees.
    """

    index: int
    image_id: int
    size: tuple[int, int]
    views: list[View]


def open_dataset(name: str, config: DetectionConfig, transforms: Any = None) -> CocoDetection:
    """The data set of a string.

    Raises:
        TypeError: it isn't one with boxes.
    """
    dataset = make_dataset(dataset_str=dataset_string(name, config.datasets.root), transforms=transforms)
    if not isinstance(dataset, CocoDetection):
        raise TypeError(f"detection needs a data set with boxes, such as CocoDetection:split=val2017; got {name!r}")
    return dataset


def make_train_dataset(config: DetectionConfig) -> CocoDetection:
    """The training set, with random changes.

    Raises:
        ValueError: no data set in the configuration.
    """
    if not config.datasets.train:
        raise ValueError("training needs datasets.train, such as CocoDetection:split=train2017")
    options = config.transforms.train
    transform = make_train_transform(
        options.short_side,
        options.max_size,
        options.min_area,
        options.crop_probability,
        options.flip_probability,
        config.transforms.mean,
        config.transforms.std,
    )
    return open_dataset(config.datasets.train, config, transform)


def make_train_loader(dataset: Dataset[Any], config: DetectionConfig, *, done: int = 0) -> Iterable[Batch]:
    """Endless batches, a function of seed, rank and iteration.

    Args:
        dataset: of (image, target).
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


def collate(samples: Sequence[tuple[Tensor, dict[str, Any]]]) -> Batch:
    """A batch of samples, whose images keep their sizes."""
    return Batch(
        [image for image, _ in samples],
        [target["labels"] for _, target in samples],
        [target["boxes"].as_subclass(Tensor) for _, target in samples],
    )


class _EvalItems(Dataset[EvalItem]):
    """This process's part of a test set."""

    def __init__(self, dataset: CocoDetection, views: Views) -> None:
        self.dataset, self.views = dataset, views
        self.indices = range(distributed.get_rank(), len(dataset), distributed.get_world_size())

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> EvalItem:
        index = self.indices[position]
        image, target = self.dataset[index]
        return EvalItem(index, target["image_id"], target["size"], self.views(image))


def make_eval_loader(dataset: CocoDetection, views: Views, num_workers: int) -> Iterable[EvalItem]:
    """The images of a test set one by one, each on one process.

    One by one, since an image's result depends on the canvas that it shares with others.
    """
    return DataLoader(_EvalItems(dataset, views), batch_size=None, num_workers=num_workers)
