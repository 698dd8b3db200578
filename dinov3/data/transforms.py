"""Deterministic evaluation transforms and the classification training transform, from `torchvision.transforms.v2`.

Here an image becomes a uint8 tensor *before* it is resized, so resampling is torchvision's tensor version (bicubic,
antialiased). In `augmentations.py` it stays a PIL image until it is normalised. The two differ by about one grey level.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

IMAGENET_DEFAULT_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEFAULT_STD = (0.229, 0.224, 0.225)
CROP_DEFAULT_SIZE = 224
RESIZE_DEFAULT_SIZE = 256


class GaussianBlur(v2.RandomApply):
    """Blurs (kernel 9 x 9, sigma uniform in [radius_min, radius_max]) with probability **1 - p**.

    The argument means the opposite of its name. The published models were trained so, hence it is kept
    (`test_gaussian_blur_applies_with_probability_one_minus_p`); the attribute `p` is the effective probability `1 - p`.
    """

    def __init__(self, *, p: float = 0.5, radius_min: float = 0.1, radius_max: float = 2.0) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie in [0, 1], got {p}")
        super().__init__([v2.GaussianBlur(kernel_size=9, sigma=(radius_min, radius_max))], p=1 - p)


def make_interpolation_mode(mode_str: str) -> InterpolationMode:
    """The interpolation mode with that value ("nearest", "bilinear", "bicubic", ...); `KeyError` if there is none."""
    modes = {mode.value: mode for mode in InterpolationMode}
    if mode_str not in modes:
        raise KeyError(f"unknown interpolation mode {mode_str!r}; known: {', '.join(modes)}")
    return modes[mode_str]


def make_normalize_transform(
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD
) -> v2.Normalize:
    """Per-channel `(x - mean) / std` of a float image with values in [0, 1]."""
    return v2.Normalize(mean=mean, std=std)


def make_base_transform(
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD
) -> v2.Compose:
    """uint8 image tensor -> float32 in [0, 1] -> normalised."""
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), make_normalize_transform(mean=mean, std=std)])


def make_resize_transform(
    *,
    resize_size: int,
    resize_square: bool = False,
    resize_large_side: bool = False,
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
) -> v2.Resize:
    """Resize the shorter side to `resize_size` pixels, or both sides (`resize_square`), or the longer one.

    Raises:
        ValueError: both flags are given.
    """
    if resize_square and resize_large_side:
        raise ValueError("resize_square and resize_large_side exclude each other: set one of them")
    if resize_square:
        return v2.Resize((resize_size, resize_size), interpolation=interpolation)
    if resize_large_side:
        return v2.Resize(size=None, max_size=resize_size, interpolation=interpolation)
    return v2.Resize(resize_size, interpolation=interpolation)


def make_eval_transform(
    *,
    resize_size: int = RESIZE_DEFAULT_SIZE,
    crop_size: int | None = CROP_DEFAULT_SIZE,
    resize_square: bool = False,
    resize_large_side: bool = False,
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> v2.Compose:
    """PIL image -> float32 [3, H, W]: resize, centre crop, normalise.

    Args:
        resize_size: pixels; see `make_resize_transform` for the two flags.
        crop_size: side of the centre crop in pixels; None or 0: no crop. A crop larger than the image pads with black.
        interpolation: of the resize.
        mean, std: of the normalisation.
    """
    steps: list[Callable[..., Any]] = [
        v2.ToImage(),
        make_resize_transform(
            resize_size=resize_size,
            resize_square=resize_square,
            resize_large_side=resize_large_side,
            interpolation=interpolation,
        ),
    ]
    if crop_size:
        steps.append(v2.CenterCrop(crop_size))
    steps.append(make_base_transform(mean=mean, std=std))
    return v2.Compose(steps)


def make_classification_eval_transform(
    *,
    resize_size: int = RESIZE_DEFAULT_SIZE,
    crop_size: int | None = CROP_DEFAULT_SIZE,
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> v2.Compose:
    """`make_eval_transform` on the shorter side."""
    return make_eval_transform(
        resize_size=resize_size, crop_size=crop_size, interpolation=interpolation, mean=mean, std=std
    )


def make_classification_train_transform(
    *,
    crop_size: int = CROP_DEFAULT_SIZE,
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
    hflip_prob: float = 0.5,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> v2.Compose:
    """PIL image -> float32 [3, crop, crop]: random resized crop of 8 to 100 % of the area, flip, normalise."""
    steps: list[Callable[..., Any]] = [v2.ToImage(), v2.RandomResizedCrop(crop_size, interpolation=interpolation)]
    if hflip_prob > 0:
        steps.append(v2.RandomHorizontalFlip(hflip_prob))
    steps.append(make_base_transform(mean=mean, std=std))
    return v2.Compose(steps)


def get_target_transform(dataset_str: str) -> Callable[[Any], torch.Tensor] | None:
    """Makes multi-hot targets of the multi-label datasets VOC2007 and IMaterialist; None for all other strings."""
    if "VOC2007" in dataset_str:
        return _voc2007_target
    if "IMaterialist" in dataset_str:
        return _imaterialist_target
    return None


def _voc2007_target(label: Any) -> torch.Tensor:
    return _multi_hot([instance.category_id for instance in label.instances], n_classes=20)


def _imaterialist_target(label: Any) -> torch.Tensor:
    return _multi_hot(list(label.attributes), n_classes=294)


def _multi_hot(classes: Sequence[int], n_classes: int) -> torch.Tensor:
    """int64 [n_classes], 1 at the given classes."""
    target = torch.zeros(n_classes, dtype=torch.int64)
    target[torch.as_tensor(classes, dtype=torch.int64)] = 1
    return target
