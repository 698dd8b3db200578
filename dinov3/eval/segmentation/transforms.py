"""From an image and its label map to tensors, for training and for evaluation.

Images are Pillow RGB images; labels are Pillow images or arrays of class indices, and 255 is ignored. All random
draws come from NumPy's global generator, in the order of the published training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from dinov3.eval.segmentation.config import DEFAULT_MEAN, DEFAULT_STD
from dinov3.eval.segmentation.metrics import preprocess_nonzero_labels

Size = int | Sequence[int] | None
PairTransform = Callable[[Image.Image, Any], tuple[Any, Tensor]]

IGNORED = 255
_CROP_TRIES = 10
_LARGEST_SHARE = 0.75  # of a crop's labelled pixels that one class may have
_TTA_MULTIPLE = 32


def make_segmentation_train_transforms(
    *,
    img_size: Size = None,
    image_interpolation: InterpolationMode = InterpolationMode.BILINEAR,
    label_interpolation: InterpolationMode = InterpolationMode.NEAREST,
    random_img_size_ratio_range: Sequence[float] | None = None,
    crop_size: Sequence[int] | None = None,
    flip_prob: float = 0.0,
    reduce_zero_label: bool = False,
    mean: Sequence[float] = DEFAULT_MEAN,
    std: Sequence[float] = DEFAULT_STD,
) -> PairTransform:
    """Random size, crop, flip and colours, for training.

    Args:
        img_size: length of the shorter side, or (height, width) [pixels]; None: as it is.
        image_interpolation, label_interpolation: of the resizing.
        random_img_size_ratio_range: bounds of a random factor of a length `img_size`.
        crop_size: (height, width) of a crop [pixels], smaller images are filled up; None: the whole image.
        flip_prob: of mirroring.
        reduce_zero_label: labels count from 1 and 0 is unlabelled.
        mean, std: of red, green and blue, for values in [0, 255].

    Returns:
        A function of (image, label) that returns float32 [3, h, w] and the label [1, h, w].

    Raises:
        ValueError: sizes, ratios or probabilities that don't make sense.
    """
    _check_size("img_size", img_size)
    _check_size("crop_size", crop_size)
    if isinstance(crop_size, int):
        raise ValueError(f"crop_size is (height, width), got {crop_size}")
    ratios = random_img_size_ratio_range
    if ratios is not None and (len(ratios) != 2 or not 0 < ratios[0] <= ratios[1] or not isinstance(img_size, int)):
        raise ValueError(
            "random_img_size_ratio_range is (smallest, largest), with img_size the length of the shorter side; got "
            f"{tuple(ratios)} with img_size={img_size}"
        )
    if not 0 <= flip_prob <= 1:
        raise ValueError(f"flip_prob is a probability, got {flip_prob}")
    return _TrainTransform(
        img_size=img_size,
        interpolations=(image_interpolation, label_interpolation),
        ratio_range=None if ratios is None else (ratios[0], ratios[1]),
        crop_size=None if crop_size is None else (crop_size[0], crop_size[1]),
        flip_prob=flip_prob,
        reduce_zero_label=reduce_zero_label,
        mean=tuple(mean),
        std=tuple(std),
    )


def make_segmentation_eval_transforms(
    *,
    img_size: Size = None,
    inference_mode: Literal["whole", "slide"] = "whole",
    image_interpolation: InterpolationMode = InterpolationMode.BILINEAR,
    label_interpolation: InterpolationMode = InterpolationMode.NEAREST,
    use_tta: bool = False,
    tta_ratios: Sequence[float] = (1.0,),
    mean: Sequence[float] = DEFAULT_MEAN,
    std: Sequence[float] = DEFAULT_STD,
) -> PairTransform:
    """One view of an image, or several for test-time augmentation.

    Args:
        img_size: length of the shorter side, or (height, width) [pixels]; None: as it is.
        inference_mode: with `slide`, labels keep their size unless `img_size` is (height, width).
        image_interpolation, label_interpolation: of the resizing.
        use_tta: a view for each ratio, then their mirror images.
        tta_ratios: factors of a length `img_size`; those below 1 give multiples of 32 pixels, rounded up.
        mean, std: of red, green and blue, for values in [0, 255].

    Returns:
        A function of (image, label) that returns a list of float32 [3, h, w] and the label [1, H, W].

    Raises:
        ValueError: sizes or modes that don't make sense.
    """
    _check_size("img_size", img_size)
    if inference_mode not in ("whole", "slide"):
        raise ValueError(f"inference_mode is 'whole' or 'slide', got {inference_mode!r}")
    sizes: list[Size] = [img_size]
    if use_tta and isinstance(img_size, int):
        sizes = [_tta_size(img_size, ratio) for ratio in tta_ratios]
    return _EvalTransform(
        sizes=sizes,
        label_size=img_size if inference_mode == "whole" or not isinstance(img_size, int) else None,
        interpolations=(image_interpolation, label_interpolation),
        mirrored=use_tta,
        mean=tuple(mean),
        std=tuple(std),
    )


def _check_size(name: str, size: Any) -> None:
    sides = [size] if isinstance(size, int) else [1] if size is None else list(size)
    if not 1 <= len(sides) <= 2 or (len(sides) == 1) != (isinstance(size, int) or size is None) or min(sides) < 1:
        raise ValueError(f"{name} is a number of pixels, [height, width] or null, got {size}")


def _tta_size(size: int, ratio: float) -> int:
    scaled = int(size * ratio)
    return scaled if ratio >= 1 else -(-scaled // _TTA_MULTIPLE) * _TTA_MULTIPLE


@dataclass(frozen=True)
class _TrainTransform:
    img_size: Size
    interpolations: tuple[InterpolationMode, InterpolationMode]
    ratio_range: tuple[float, float] | None
    crop_size: tuple[int, int] | None
    flip_prob: float
    reduce_zero_label: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image, label: Any) -> tuple[Tensor, Tensor]:
        size = self.img_size
        if self.ratio_range is not None and isinstance(size, int):
            low, high = self.ratio_range
            size = max(int(size * (np.random.random_sample() * (high - low) + low)), 1)
        mask = _resize(label_tensor(label), size, self.interpolations[1])
        pixels = TF.pil_to_tensor(_resize(image, size, self.interpolations[0]))
        if self.reduce_zero_label:
            mask = preprocess_nonzero_labels(mask)
        if self.crop_size is not None:
            top, left = _draw_crop(mask, self.crop_size)
            height, width = self.crop_size
            pixels, mask = (t[:, top : top + height, left : left + width] for t in (pixels, mask))
        if np.random.rand() < self.flip_prob:
            pixels, mask = pixels.flip(-1), mask.flip(-1)
        normalized = normalize(distort_colours(pixels), self.mean, self.std)
        if self.crop_size is not None:
            rest = (0, self.crop_size[1] - mask.shape[-1], 0, self.crop_size[0] - mask.shape[-2])
            normalized, mask = F.pad(normalized, rest), F.pad(mask, rest, value=IGNORED)
        return normalized.contiguous(), mask.contiguous()


@dataclass(frozen=True)
class _EvalTransform:
    sizes: list[Size]
    label_size: Size
    interpolations: tuple[InterpolationMode, InterpolationMode]
    mirrored: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image, label: Any) -> tuple[list[Tensor], Tensor]:
        mask = _resize(label_tensor(label), self.label_size, self.interpolations[1])
        views = [TF.pil_to_tensor(_resize(image, size, self.interpolations[0])) for size in self.sizes]
        if self.mirrored:
            views += [view.flip(-1) for view in views]
        return [normalize(view, self.mean, self.std) for view in views], mask


def label_tensor(label: Any) -> Tensor:
    """A label map as integers [1, H, W]: uint8 as it is, wider unsigned ones as int32.

    Args:
        label: Pillow image with one channel (grey of 8 or 16 bits, palette indices, or bilevel), or array or tensor
            [H, W] or [1, H, W].

    Raises:
        ValueError: several channels, or other numbers than integers.
    """
    if isinstance(label, Image.Image) and label.mode not in ("L", "P", "1", "I", "I;16", "I;16L", "I;16B"):
        raise ValueError(
            f"got a label image of mode {label.mode}, expected one channel of class indices (grey or palette): "
            "translate colours into indices first"
        )
    array = np.asarray(label)
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 2 or array.dtype.kind not in "uib":
        raise ValueError(f"got labels of shape {array.shape} and type {array.dtype}, expected integers [H, W]")
    if array.dtype == bool:
        array = array.astype(np.uint8)
    elif array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int32 if array.dtype.itemsize == 2 else np.int64)
    return torch.from_numpy(np.array(array)).unsqueeze(0)  # a copy, in this machine's byte order


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Values in [0, 255], [3, H, W], as float32 (x - mean) / std."""
    columns = torch.tensor([mean, std], dtype=torch.float32).view(2, 3, 1, 1)
    return (pixels.float() - columns[0]) / columns[1]


def distort_colours(pixels: Tensor) -> Tensor:
    """Random brightness, contrast, saturation and hue, each with probability 1/2; uint8 [3, H, W]."""
    if np.random.randint(2):
        pixels = _to_uint8(pixels.float() + np.random.uniform(-32, 32))
    contrast_first = bool(np.random.randint(2))
    if contrast_first:
        pixels = _distort_contrast(pixels)
    if np.random.randint(2):
        pixels = TF.adjust_saturation(pixels, np.random.uniform(0.5, 1.5))
    if np.random.randint(2):
        pixels = TF.adjust_hue(pixels, np.random.uniform(-0.5, 0.5))
    return pixels if contrast_first else _distort_contrast(pixels)


def _distort_contrast(pixels: Tensor) -> Tensor:
    return _to_uint8(pixels.float() * np.random.uniform(0.5, 1.5)) if np.random.randint(2) else pixels


def _to_uint8(values: Tensor) -> Tensor:
    return values.clamp(0, 255).to(torch.uint8)


def _draw_crop(label: Tensor, crop_size: tuple[int, int]) -> tuple[int, int]:
    """Top and left of a crop in which no class has almost everything, if a few tries find one."""
    place = _draw_place(label, crop_size)
    for _ in range(_CROP_TRIES):
        crop = label[0, place[0] : place[0] + crop_size[0], place[1] : place[1] + crop_size[1]]
        counts = crop[crop != IGNORED].unique(return_counts=True)[1]
        if len(counts) > 1 and counts.max() / counts.sum() < _LARGEST_SHARE:
            break
        place = _draw_place(label, crop_size)
    return place


def _draw_place(label: Tensor, crop_size: tuple[int, int]) -> tuple[int, int]:
    top = np.random.randint(0, max(label.shape[-2] - crop_size[0], 0) + 1)
    left = np.random.randint(0, max(label.shape[-1] - crop_size[1], 0) + 1)
    return int(top), int(left)


def _resize(image: Any, size: Size, interpolation: InterpolationMode) -> Any:
    """A Pillow image or tensor [1, H, W] in another size."""
    if size is None:
        return image
    height, width = image.shape[-2:] if isinstance(image, Tensor) else (image.height, image.width)
    if isinstance(size, int):
        target = (
            (size, int(size * width / height + 0.5)) if height <= width else (int(size * height / width + 0.5), size)
        )
    else:
        target = (size[0], size[1])
    return image if target == (height, width) else TF.resize(image, list(target), interpolation=interpolation)
