"""The last part of the augmentation path `device`: distortions of whole batches, on the accelerator.

Workers decode, cut, resize and draw; nothing is random here. Crops travel as bytes, a quarter of their later size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dinov3.data.augmentations import DataAugmentationDINO
from dinov3.data.kernels import distort_batch_
from dinov3.data.tensor_augmentation import CropFinisher, Distort, is_whole


class DeviceAugmentation:
    """Distorts and normalises a collated batch whose crops are still grey levels.

    Args:
        options: the `DataAugmentationDINO`, with `augmentation="device"`, that made the crops.
        device, dtype: where the work is done, in float32, and what the crops are then cast to.

    Raises:
        ValueError: `options` made finished crops.
    """

    def __init__(self, options: DataAugmentationDINO, *, device: torch.device, dtype: torch.dtype) -> None:
        if options.augmentation != "device":
            raise ValueError(f"DeviceAugmentation needs augmentation='device', got {options.augmentation!r}")
        self.finish = CropFinisher(options)
        self.device = device
        self.dtype = dtype

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as `collate_data_and_cast` gives it on the other paths; its crops are on the device."""
        batch = dict(batch)
        distortions = batch.pop("distortions")
        views, local = batch["collated_global_crops"], batch["collated_local_crops"]
        crops, gram = self.finish.view(self._on_device(views), _distorting_rows(distortions["global"], views))
        batch["collated_global_crops"] = crops.to(self.dtype)
        if gram is not None:
            batch["collated_gram_teacher_crops"] = gram.to(self.dtype)
        if local.shape[0]:
            finished = self.finish.normalize_(_distorting_rows(distortions["local"], local)(self._on_device(local)))
            batch["collated_local_crops"] = finished.to(self.dtype)
        return batch

    def _on_device(self, crops: Tensor) -> Tensor:
        return crops.to(self.device, non_blocking=True).to(torch.float32, copy=True)


class DeviceAugmentedLoader:
    """A loader whose batches are finished by a `DeviceAugmentation` as they are taken.

    Attributes:
        dataset, batch_size: those of the loader.
    """

    def __init__(self, loader: DataLoader[Any], augmentation: DeviceAugmentation) -> None:
        self.loader = loader
        self.augmentation = augmentation
        self.dataset = loader.dataset
        self.batch_size = loader.batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.augmentation, self.loader)


def _distorting_rows(distortions: dict[str, Tensor], like: Tensor) -> Distort:
    return lambda crops: distort_batch_(crops, distortions, whole=is_whole(like))
