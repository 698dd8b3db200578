"""Colour changes and blur of float images, for one image or a batch, on any device.

Images are [..., C, H, W] with grey levels from 0 to 255. Factors are numbers, or tensors [..., 1, 1, 1] with one for
each image. Functions whose name ends in `_` may write into the image and return the result.

Results follow Pillow's integer arithmetic (cut off after each operation, hue in 256 steps), on which the released
models were trained, as long as `whole` is true. With `whole=False` nothing is rounded: for images of more than 8 bits.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.data.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, Distortion

_KERNEL_RADIUS = 4  # kernel 9 x 9
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2
_HUE_STEPS = 255  # of a full turn, in an 8-bit hue


def brightness_(image: Tensor, factor: float | Tensor, *, whole: bool = True) -> Tensor:
    """`factor * image`."""
    return _settled_(image.mul_(factor), whole)


def contrast_(image: Tensor, factor: float | Tensor, *, whole: bool = True) -> Tensor:
    """Between (and beyond) the mean grey of the image, at 0, and the image, at 1."""
    mean = luma(image, whole=whole).mean((-3, -2, -1), keepdim=True)
    return _blend_(image, mean.add_(0.5).floor_() if whole else mean, factor, whole)


def saturation_(image: Tensor, factor: float | Tensor, *, whole: bool = True) -> Tensor:
    """Between its shades of grey, at 0, and the image, at 1."""
    return _blend_(image, luma(image, whole=whole), factor, whole)


def hue_(image: Tensor, factor: float | Tensor, *, whole: bool = True) -> Tensor:
    """Turn the hue by `factor` turns; value and saturation (HSV) stay."""
    red, green, blue = image.unbind(-3)
    value = torch.maximum(torch.maximum(red, green), blue)
    lowest = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - lowest
    # Sextant of the hue, in [-1, 5]: 0 red, 2 green, 4 blue. Grey pixels get 0, which their chroma cancels.
    green_max = (green == value).to(image.dtype)
    red_max = (red == value).to(image.dtype)
    sextant = blue.sub(red).add_(chroma, alpha=2).mul_(green_max)
    sextant.add_(red.sub(green).add_(chroma, alpha=4).mul_(1 - green_max)).mul_(1 - red_max)
    sextant.add_(green.sub(blue).mul_(red_max)).div_(chroma.clamp(min=1e-6))
    if whole:
        steps = factor.mul(_HUE_STEPS).trunc() if isinstance(factor, Tensor) else math.trunc(factor * _HUE_STEPS)
        if isinstance(steps, Tensor):
            steps = steps.squeeze(-3)
        # An 8-bit hue of 255 steps to the turn that wraps at 256, as in Pillow.
        step = _wrapped_(sextant.mul_(_HUE_STEPS / 6), _HUE_STEPS).floor_().add_(steps)
        sextant = _wrapped_(step, 256).mul_(6 / _HUE_STEPS)
    else:
        shift = factor.squeeze(-3) if isinstance(factor, Tensor) else factor
        sextant = _wrapped_(sextant.add_(shift * 6), 6)
    # Share of the chroma in each channel: |h - 3| - 1, 2 - |h - 2|, 2 - |h - 4|, cut to [0, 1].
    distance = sextant.unsqueeze(-3) - _column((3, 2, 4), image)
    share = distance.abs_().mul_(_column((1, -1, -1), image)).add_(_column((-1, 2, 2), image)).clamp_(0, 1)
    turned = share.mul_(chroma.unsqueeze(-3)).add_(lowest.unsqueeze(-3))
    return turned.round_() if whole else turned


def grayscale_(image: Tensor, *, whole: bool = True) -> Tensor:
    """Shades of grey in all channels."""
    return image.copy_(luma(image, whole=whole).expand_as(image))


def solarize_(image: Tensor) -> Tensor:
    """Invert what lies at or above 128."""
    return torch.minimum(image, 255 - image)


def gaussian_blur(image: Tensor, sigma: float | Tensor, *, whole: bool = True) -> Tensor:
    """9 x 9 Gaussian of `sigma` px; the border reflects."""
    weights = _taps(sigma)
    radius = len(weights) - 1
    if radius == 0:
        return image
    height, width = image.shape[-2:]
    batch = image.reshape(-1, *image.shape[-3:])
    padded = F.pad(batch, (radius,) * 4, mode="reflect").reshape(*image.shape[:-2], height + 2 * radius, -1)
    blurred = _weighted_sum(padded, weights, dim=-2, size=height)
    blurred = _weighted_sum(blurred, weights, dim=-1, size=width)
    return blurred.round_() if whole else blurred


def _taps(sigma: float | Tensor) -> list[float | Tensor]:
    """Weights of the middle and of the taps at distance 1, 2, ... on either side of it, which sum to 1."""
    offsets = range(1, _KERNEL_RADIUS + 1)
    if isinstance(sigma, Tensor):
        sides = torch.stack([torch.exp(-0.5 * (i / sigma) ** 2) for i in offsets])
        total = 1 + 2 * sides.sum(0)
        return [1 / total, *(sides / total)]
    side = [math.exp(-0.5 * (i / sigma) ** 2) for i in offsets]
    share = 1 / (1 + 2 * sum(side))
    # Taps that change no value by a hundredth of a level are left out.
    return [share, *(weight * share for weight in side if weight * share > 2e-5)]


def luma(image: Tensor, *, whole: bool = True) -> Tensor:
    """Shades of grey [..., 1, H, W]; images that aren't RGB: the mean of the channels."""
    if image.shape[-3] != 3:
        grey = image.mean(-3, keepdim=True)
    else:
        red, green, blue = image.unbind(-3)
        grey = red.mul(_LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2]).unsqueeze(-3)
    return grey.add_(0.5).floor_() if whole else grey


_JITTER = {BRIGHTNESS: brightness_, CONTRAST: contrast_, SATURATION: saturation_, HUE: hue_}


def distort_(image: Tensor, distortion: Distortion, *, whole: bool = True) -> Tensor:
    """One image [C, H, W], distorted. Images that aren't RGB have no saturation and hue to change."""
    is_rgb = image.shape[-3] == 3
    for operation, factor in distortion.jitter:
        if is_rgb or operation in (BRIGHTNESS, CONTRAST):
            image = _JITTER[operation](image, factor, whole=whole)
    if distortion.grayscale and is_rgb:
        image = grayscale_(image, whole=whole)
    if distortion.blur_sigma > 0:
        image = gaussian_blur(image, distortion.blur_sigma, whole=whole)
    return solarize_(image) if distortion.solarize else image


def distort_batch_(images: Tensor, distortions: dict[str, Tensor], *, whole: bool = True) -> Tensor:
    """A batch [B, C, H, W], each image distorted by its row of `draws.stack_distortions` (on the CPU)."""
    is_rgb = images.shape[-3] == 3
    for position in range(distortions["order"].shape[1]):
        for operation, kernel in _JITTER.items():
            if is_rgb or operation in (BRIGHTNESS, CONTRAST):
                rows = distortions["order"][:, position] == operation
                factors = distortions["factors"][:, position]
                _apply_to_rows_(images, rows, lambda x, f, k=kernel: k(x, f, whole=whole), factors)
    if is_rgb:
        _apply_to_rows_(images, distortions["grayscale"], lambda x: grayscale_(x, whole=whole))
    sigma = distortions["blur_sigma"]
    _apply_to_rows_(images, sigma > 0, lambda x, s: gaussian_blur(x, s, whole=whole), sigma)
    _apply_to_rows_(images, distortions["solarize"], solarize_)
    return images


def _apply_to_rows_(images: Tensor, rows: Tensor, kernel: Callable[..., Any], *factors: Tensor) -> None:
    index = rows.nonzero().flatten()
    if index.numel() == 0:
        return
    per_image = [values[index].to(images.device, images.dtype).view(-1, 1, 1, 1) for values in factors]
    index = index.to(images.device)
    images.index_copy_(0, index, kernel(images.index_select(0, index), *per_image))


def _blend_(image: Tensor, other: Tensor, factor: float | Tensor, whole: bool) -> Tensor:
    # In this form, as Pillow's, rounding can't move what equals the other image.
    return _settled_(image.sub_(other).mul_(factor).add_(other), whole)


def _settled_(image: Tensor, whole: bool) -> Tensor:
    image.clamp_(0, 255)
    return image.floor_() if whole else image


def _wrapped_(values: Tensor, period: float) -> Tensor:
    """Values from one period on either side of [0, period), brought into it."""
    return values.sub_(values.div(period).floor_(), alpha=period)


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def _weighted_sum(padded: Tensor, weights: Sequence[float | Tensor], *, dim: int, size: int) -> Tensor:
    """Sum of the `size` long windows of `dim`, weighted symmetrically around the middle one."""
    radius = len(weights) - 1
    total = padded.narrow(dim, radius, size) * weights[0]
    for i, weight in enumerate(weights[1:], start=1):
        pair = padded.narrow(dim, radius - i, size) + padded.narrow(dim, radius + i, size)
        if isinstance(weight, Tensor):
            total.addcmul_(pair, weight)
        else:
            total.add_(pair, alpha=weight)
    return total
