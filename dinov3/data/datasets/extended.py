"""Base of the datasets: bytes and target by index, decoded, then transformed together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.datasets import VisionDataset

from dinov3.data.datasets.decoders import Decoder, ImageDataDecoder, TargetDecoder


class ExtendedVisionDataset(VisionDataset):
    """Items are (decoded image, decoded target), passed through `transforms`.

    A subclass gives `get_image_data`, `get_target` and `__len__`.

    Args:
        image_decoder, target_decoder: made from the data of an item; their `decode()` is the item.
        root: folder of the dataset.
        transforms: called with (image, target); or
        transform, target_transform: called with one of them each.
    """

    def __init__(
        self,
        image_decoder: type[Decoder] = ImageDataDecoder,
        target_decoder: type[Decoder] = TargetDecoder,
        root: str | Path | None = None,
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            root=root,
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )
        self.image_decoder = image_decoder
        self.target_decoder = target_decoder

    def get_image_data(self, index: int) -> bytes:
        """The encoded image of a sample."""
        raise NotImplementedError(f"{type(self).__name__} does not define get_image_data")

    def get_target(self, index: int) -> Any:
        """The target of a sample, not yet decoded."""
        raise NotImplementedError(f"{type(self).__name__} does not define get_target")

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} does not define __len__")

    def decode_image(self, index: int) -> Image.Image:
        """The decoded image of a sample.

        Raises:
            RuntimeError: it can't be read or decoded; the cause says why.
        """
        try:
            return self.image_decoder(self.get_image_data(index)).decode()
        except Exception as error:
            raise RuntimeError(f"can not read image for sample {index}") from error

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = self.decode_image(index)
        target = self.target_decoder(self.get_target(index)).decode()
        return self.transforms(image, target) if self.transforms is not None else (image, target)
