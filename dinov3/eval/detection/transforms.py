"""Transforms of images with boxes, and how sizes are chosen.

They are torchvision's: an image and its boxes (`tv_tensors.BoundingBoxes`) go in together, other tensors pass through.
Torch's global generator decides, so a seeded loader repeats its draws.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MIN_AREA = 1.0  # boxes that a crop leaves no more of are no objects [square pixels]

Target = dict[str, Any]


def resized_size(height: int, width: int, short_side: int, max_size: int | None, multiple: int) -> tuple[int, int]:
    """Size (height, width) of an image after its shorter side has become `short_side`.

    Args:
        height, width: before [pixels].
        short_side: [pixels]; less, if the longer side would exceed `max_size`.
        max_size: of the longer side [pixels], None for no limit.
        multiple: both sides are rounded up to multiples of it.
    """
    scale = short_side / min(height, width)
    if max_size is not None:
        scale = min(scale, max_size / max(height, width))
    new_height, new_width = (-(-max(1, round(side * scale)) // multiple) * multiple for side in (height, width))
    return new_height, new_width


class ResizeShortSide(v2.Transform):
    """Resize (bilinear, antialiased) by the shorter side.

    Args:
        short_side: [pixels], or two numbers: drawn uniformly between them, both included.
        max_size: of the longer side [pixels], before it is rounded up; None for no limit.
        multiple: both sides are rounded up to multiples of it, usually the patch.
    """

    def __init__(self, short_side: int | Sequence[int], max_size: int | None = None, multiple: int = 1) -> None:
        super().__init__()
        self.low, self.high = (short_side, short_side) if isinstance(short_side, int) else short_side
        if not 1 <= self.low <= self.high or multiple < 1:
            raise ValueError(
                f"short_side must be a size or a range of sizes, and multiple at least 1; got {short_side}, {multiple}"
            )
        self.max_size, self.multiple = max_size, multiple

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The size."""
        height, width = v2.query_size(flat_inputs)
        short_side = self.low
        if self.high > self.low:
            short_side = int(torch.randint(self.low, self.high + 1, ()))
        return {"size": list(resized_size(height, width, short_side, self.max_size, self.multiple))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """One image, or the boxes."""
        return TF.resize(inpt, params["size"], interpolation=v2.InterpolationMode.BILINEAR, antialias=True)


class RandomAreaCrop(v2.Transform):
    """Cut out a part of the image, of random area, shape and place. Boxes may end outside; see `keep_visible`.

    Args:
        min_area: smallest part of the area; the largest is all.
        p: probability; otherwise nothing is cut.
    """

    def __init__(self, min_area: float = 0.6, p: float = 0.5) -> None:
        super().__init__()
        if not 0 < min_area <= 1 or not 0 <= p <= 1:
            raise ValueError(f"min_area must lie in (0, 1] and p in [0, 1], got {min_area} and {p}")
        self.min_area, self.p = min_area, p

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The box of the crop."""
        height, width = v2.query_size(flat_inputs)
        happens, area, shape, y, x = torch.rand(5).tolist()
        if happens >= self.p:
            return {"top": 0, "left": 0, "height": height, "width": width}
        area = self.min_area + area * (1 - self.min_area)
        part = area ** (1 - shape)  # of the height; log-uniform from all the width to all the height
        new_height, new_width = max(1, round(height * part)), max(1, round(width * area / part))
        return {
            "top": math.floor(y * (height - new_height + 1)),
            "left": math.floor(x * (width - new_width + 1)),
            "height": new_height,
            "width": new_width,
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """One image, or the boxes."""
        return TF.crop(inpt, **params)


def keep_visible(target: Target) -> Target:
    """The target with boxes clipped to the image, and without objects of which nothing is left."""
    boxes = TF.clamp_bounding_boxes(target["boxes"])
    keep = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) > _MIN_AREA
    return target | {"boxes": tv_tensors.wrap(boxes[keep], like=boxes), "labels": target["labels"][keep]}


class DetectionTransform:
    """(image, target) -> (normalised image `[3, H, W]`, target with the boxes that are visible).

    Args:
        steps: torchvision transforms of the image as a uint8 tensor, together with the boxes.
        mean, std: of images in [0, 1].
    """

    def __init__(
        self, steps: Sequence[v2.Transform], mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
    ) -> None:
        to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
        self._geometry = v2.Compose([v2.ToImage(), *steps])
        self._values = v2.Compose(to_float)

    def __call__(self, image: Any, target: Target) -> tuple[Tensor, Target]:
        """Args: a PIL image or uint8 tensor; a target with `boxes` (`tv_tensors.BoundingBoxes`, xyxy) and `labels`."""
        image, boxes = self._geometry(image, target["boxes"])
        return self._values(image).as_subclass(Tensor), keep_visible(target | {"boxes": boxes})


def make_train_transform(
    short_side: Sequence[int],
    max_size: int | None = None,
    min_area: float = 0.6,
    crop_probability: float = 0.5,
    flip_probability: float = 0.5,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> DetectionTransform:
    """Mirror, then cut or don't, then resize to a random size.

    Args:
        short_side: range of sizes [pixels].
        max_size: of the longer side [pixels].
        min_area: smallest part of the area that a crop keeps.
        crop_probability, flip_probability: how often images are cut and mirrored.
        mean, std: of images in [0, 1].
    """
    steps = [
        v2.RandomHorizontalFlip(flip_probability),
        RandomAreaCrop(min_area, crop_probability),
        ResizeShortSide(list(short_side), max_size),
    ]
    return DetectionTransform(steps, mean, std)


def make_eval_transform(
    short_side: int,
    max_size: int | None = None,
    multiple: int = 16,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> v2.Compose:
    """An image (PIL, or uint8 tensor) -> the normalised tensor `[3, H, W]` for the detector.

    Args:
        short_side: [pixels].
        max_size: of the longer side [pixels].
        multiple: both sides are rounded up to multiples of it, usually the patch.
        mean, std: of images in [0, 1].
    """
    return v2.Compose(
        [
            v2.ToImage(),
            ResizeShortSide(short_side, max_size, multiple),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std)),
            v2.ToPureTensor(),
        ]
    )
