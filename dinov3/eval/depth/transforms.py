"""From an image and its depth map to tensors, for training and for evaluation.

Images are Pillow RGB images. Depth maps are Pillow images or arrays in stored units, which are divided by a constant to
give metres, or `Depth`, which is in metres already. Random draws come from torch's global generator.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from dinov3.data.datasets.depth_folder import Depth
from dinov3.eval.depth.config import IMAGENET_MEAN, IMAGENET_STD

__all__ = [
    "ColorAug",
    "Depth",
    "LeftRightFlipAug",
    "NYUCrop",
    "make_depth_eval_transforms",
    "make_depth_train_transforms",
]

Size = int | Sequence[int] | None
Pair = tuple[tv_tensors.Image, Depth]

_SMALLEST_CONSTANT = 1e-6
_NYU_SIZE = (640, 480)  # width, height
_NYU_BOX = (43, 45, 608, 472)  # x1, y1, x2, y2: inside of the white frame
_GAMMA_RANGE = _COLOUR_RANGE = (0.9, 1.1)


class NYUCrop(nn.Module):
    """Cuts off the white frame of images of NYU Depth v2, whatever their size."""

    def forward(self, x: Any) -> Any:
        """The inside of a tensor `[..., H, W]` (of any kind) or a Pillow image."""
        height, width = x.shape[-2:] if isinstance(x, Tensor) else (x.height, x.width)
        sizes = zip(_NYU_BOX, _NYU_SIZE * 2, (width, height) * 2, strict=True)
        left, top, right, bottom = (int(edge / original * size) for edge, original, size in sizes)
        return TF.crop(x, top, left, bottom - top, right - left)


def _fixed_crop(name: str) -> Callable[[Any], Any]:
    crops: dict[str, Callable[[Any], Any]] = {"FULL": nn.Identity(), "NYU": NYUCrop()}
    if name.upper() not in crops:
        raise ValueError(f"unknown fixed_crop {name!r}; known: {', '.join(crops)}")
    return crops[name.upper()]


# --- Colours ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColourDraw:
    """What is random in a change of colours: exponent, factor of brightness, factor of each channel."""

    gamma: float
    brightness: float
    channels: tuple[float, ...]


class ColorAug(nn.Module):
    """With probability p: clip((255 v)^gamma * brightness * channel, 0, 255) / 255 for images v in [0, 1].

    Args:
        brightness_range: of the factor for all channels.
        gamma_range: of the exponent.
        channel_range: of the factor for each channel.
        prob: p.
    """

    def __init__(
        self,
        brightness_range: Sequence[float] = (0.9, 1.1),
        gamma_range: Sequence[float] = _GAMMA_RANGE,
        channel_range: Sequence[float] = _COLOUR_RANGE,
        prob: float = 0.5,
    ) -> None:
        super().__init__()
        self.brightness_range, self.gamma_range, self.channel_range = brightness_range, gamma_range, channel_range
        self.prob = prob

    def draw(self) -> ColourDraw | None:
        """Draw the parameters; None: leave the image as it is."""
        if not _happens(self.prob):
            return None
        gamma, brightness = _uniform(self.gamma_range), _uniform(self.brightness_range)
        return ColourDraw(gamma, brightness, tuple(_uniform(self.channel_range) for _ in range(3)))

    @staticmethod
    def apply_draw(image: Tensor, draw: ColourDraw | None) -> Tensor:
        """The image `[3, H, W]` in float32 with these parameters."""
        if draw is None:
            return image
        factors = torch.tensor(draw.channels, dtype=image.dtype, device=image.device)[:, None, None] * draw.brightness
        return ((image * 255) ** draw.gamma * factors).clamp(0, 255) / 255

    def forward(self, image: Tensor) -> Tensor:
        """An image `[3, H, W]` in [0, 1], changed at random."""
        return self.apply_draw(image, self.draw())


# --- Evaluation ------------------------------------------------------------------------------------------------------


class LeftRightFlipAug(nn.Module):
    """An image and its mirror image, for predictions that are averaged over both.

    Args:
        flip: False: the image alone.
    """

    def __init__(self, flip: bool = True) -> None:
        super().__init__()
        self.flip = flip

    def forward(self, image: Tensor, depth: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Lists of one or two images `[..., H, W]`, and of as many depth maps."""
        if not self.flip:
            return [image], [depth]
        return [image, image.flip(-1)], [depth, depth.flip(-1)]

    def inverse(self, y: Tensor) -> Tensor:
        """Mean of predictions `[2B, ...]` of images and, behind them, of their mirror images: `[B, ...]`."""
        if not self.flip:
            return y
        plain, flipped = y.chunk(2)
        return (plain + flipped.flip(-1)) / 2


def make_depth_eval_transforms(
    *,
    normalization_constant: float = 1.0,
    img_size: Size = None,
    image_interpolation: InterpolationMode = InterpolationMode.BILINEAR,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    fixed_crop: str = "FULL",
    tta: bool = False,
) -> Callable[[Any, Any], tuple[list[Tensor], list[Tensor]]]:
    """Images for evaluation; depth maps keep their size.

    Args:
        normalization_constant: what stored depths are divided by to give metres.
        img_size: length of the shorter side, or (height, width) of the image [pixels]; None: as it is.
        image_interpolation: of the resizing.
        mean, std: of red, green and blue, for values in [0, 1].
        fixed_crop: "FULL", or "NYU" (see `NYUCrop`).
        tta: add the mirror image.

    Returns:
        A function of (image, depth map) to (images `[3, h, w]`, depth maps `[1, H, W]`), lists of one or two, float32.

    Raises:
        ValueError: a constant that isn't positive, an unknown crop, a size that makes no sense.
    """
    _check_constant(normalization_constant)
    crop, size, flip = _fixed_crop(fixed_crop), _as_size(img_size), LeftRightFlipAug(flip=tta)

    def transform(image: Any, depth: Any) -> tuple[list[Tensor], list[Tensor]]:
        pixels = as_image(crop(image))
        if size is not None:
            pixels = TF.resize(pixels, size, interpolation=image_interpolation, antialias=True)
        metres = as_depth(depth, normalization_constant)
        return flip(*_pure(TF.normalize(pixels, mean, std), crop(metres)))

    return transform


# --- Training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainDraw:
    """What is random in a training sample: rotation [degrees], mirroring, top and left of the crop, colours."""

    angle: float | None
    flip: bool
    crop: tuple[int, int] | None
    colour: ColourDraw | None


class DepthTrainTransform:
    """See `make_depth_train_transforms`, which makes it."""

    def __init__(
        self,
        *,
        normalization_constant: float,
        rotation_angle: float,
        interpolation: InterpolationMode,
        img_size: Size,
        random_crop_size: Sequence[int] | None,
        fixed_crop: str,
        mean: Sequence[float],
        std: Sequence[float],
        brightness_range: Sequence[float],
    ) -> None:
        _check_constant(normalization_constant)
        if random_crop_size is not None and len(random_crop_size) != 2:
            raise ValueError(f"random_crop is (height, width), got {random_crop_size}")
        if len(brightness_range) != 2 or not 0 < brightness_range[0] <= brightness_range[1]:
            raise ValueError(f"brightness_range is (smallest, largest) factor, got {tuple(brightness_range)}")
        self.normalization_constant = normalization_constant
        self.rotation_angle = rotation_angle
        self.interpolation = interpolation
        self.img_size = _as_size(img_size)
        self.crop_size = None if random_crop_size is None else (int(random_crop_size[0]), int(random_crop_size[1]))
        self.fixed_crop = _fixed_crop(fixed_crop)
        self.mean, self.std = tuple(mean), tuple(std)
        self.colours = ColorAug(brightness_range)

    def __call__(self, image: Any, depth: Any) -> tuple[Tensor, Tensor]:
        """Image `[3, h, w]`, normalised, and depth `[1, h, w]` in metres, float32."""
        pair = self.prepare(image, depth)
        return self.apply(pair, self.draw(*pair[0].shape[-2:]))

    def prepare(self, image: Any, depth: Any) -> Pair:
        """What isn't random: fixed crop, resizing, tensors in [0, 1] and in metres."""
        image, metres = self.fixed_crop(image), self.fixed_crop(as_depth(depth, self.normalization_constant))
        if self.img_size is not None:
            image = TF.resize(image, self.img_size, interpolation=self.interpolation, antialias=True)
            # Pixel centres, as Pillow takes the nearest neighbour.
            resized = TF.resize(_plain(metres), self.img_size, interpolation=InterpolationMode.NEAREST_EXACT)
            metres = Depth(resized)
        pixels = as_image(image)
        if pixels.shape[-2:] != metres.shape[-2:]:
            raise ValueError(
                f"the image has {tuple(pixels.shape[-2:])} pixels, its depth map {tuple(metres.shape[-2:])}: set "
                "transforms.train.img_size=[height,width] to bring both to one size"
            )
        return pixels, metres

    def draw(self, height: int, width: int) -> TrainDraw:
        """Draw for an image of that size."""
        angle = _uniform((-self.rotation_angle, self.rotation_angle)) if _happens(0.5) else None
        flip = _happens(0.5)
        return TrainDraw(angle, flip, self._draw_crop(height, width), self.colours.draw())

    def _draw_crop(self, height: int, width: int) -> tuple[int, int] | None:
        if self.crop_size is None:
            return None
        rest = (height - self.crop_size[0], width - self.crop_size[1])
        if min(rest) < 0:
            raise ValueError(
                f"an image of {height} x {width} pixels is smaller than transforms.train.random_crop="
                f"{list(self.crop_size)}: choose a smaller crop, or set transforms.train.img_size"
            )
        return int(torch.randint(rest[0] + 1, (1,))), int(torch.randint(rest[1] + 1, (1,)))

    def apply(self, pair: Pair, draw: TrainDraw) -> tuple[Tensor, Tensor]:
        """The sample with these draws."""
        image, depth = pair
        if draw.angle is not None:
            image = TF.rotate(image, draw.angle, interpolation=InterpolationMode.BILINEAR)
            depth = TF.rotate(depth, draw.angle)  # a mask: nearest neighbour
        if draw.flip:
            image, depth = TF.horizontal_flip(image), TF.horizontal_flip(depth)
        if draw.crop is not None and self.crop_size is not None:
            image, depth = (TF.crop(x, *draw.crop, *self.crop_size) for x in (image, depth))
        coloured = self.colours.apply_draw(_plain(image), draw.colour)
        return TF.normalize(coloured, self.mean, self.std), _plain(depth)


def make_depth_train_transforms(
    *,
    normalization_constant: float = 1.0,
    rotation_angle: float = 2.5,
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
    img_size: Size = None,
    random_crop_size: Sequence[int] | None = (352, 704),
    fixed_crop: str = "FULL",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    brightness_range: Sequence[float] = (0.9, 1.1),
) -> DepthTrainTransform:
    """Random rotation, mirroring, crop and colours, for training.

    Args:
        normalization_constant: what stored depths are divided by to give metres.
        rotation_angle: largest one [degrees]; every other image is rotated, what comes in has no depth.
        interpolation: of the image's resizing.
        img_size: length of the shorter side, or (height, width) of image and depth map [pixels]; None: as they are.
        random_crop_size: (height, width) [pixels]; None: no crop.
        fixed_crop: "FULL", or "NYU" (see `NYUCrop`).
        mean, std: of red, green and blue, for values in [0, 1].
        brightness_range: see `ColorAug`.

    Returns:
        A function of (image, depth map) to (`[3, h, w]`, `[1, h, w]` in metres), float32.

    Raises:
        ValueError: options that make no sense; later, images smaller than the crop.
    """
    return DepthTrainTransform(
        normalization_constant=normalization_constant,
        rotation_angle=rotation_angle,
        interpolation=interpolation,
        img_size=img_size,
        random_crop_size=random_crop_size,
        fixed_crop=fixed_crop,
        mean=mean,
        std=std,
        brightness_range=brightness_range,
    )


# --- Parts -----------------------------------------------------------------------------------------------------------


def as_image(image: Any) -> tv_tensors.Image:
    """A Pillow image or uint8 tensor `[3, H, W]` in float32 in [0, 1]."""
    return tv_tensors.Image(TF.to_dtype(TF.to_image(image), torch.float32, scale=True))


def as_depth(depth: Any, normalization_constant: float) -> Depth:
    """A depth map in metres: a Pillow image, array or tensor in stored units, or a `Depth`, which is in metres."""
    if isinstance(depth, Depth):
        return depth
    stored = depth if isinstance(depth, Tensor) else torch.from_numpy(np.array(depth, dtype=np.float32))
    return Depth(stored.float().reshape(1, *stored.shape[-2:]) / normalization_constant)


def _plain(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor)


def _pure(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(_plain(tensor).contiguous() for tensor in tensors)


def _check_constant(normalization_constant: float) -> None:
    if not normalization_constant > _SMALLEST_CONSTANT:
        raise ValueError(
            f"normalization_constant must be larger than {_SMALLEST_CONSTANT}, got {normalization_constant}"
        )


def _as_size(size: Size) -> list[int] | None:
    """As torchvision takes it: one number is the length of the shorter side."""
    if size is None:
        return None
    sides = [int(size)] if isinstance(size, int) else [int(side) for side in size]
    if not 1 <= len(sides) <= 2 or min(sides) < 1:
        raise ValueError(f"img_size is the length of the shorter side, or (height, width); got {size}")
    return sides


def _happens(p: float) -> bool:
    return bool(torch.rand(()) < p)


def _uniform(bounds: Sequence[float]) -> float:
    low, high = bounds
    return low + (high - low) * float(torch.rand((), dtype=torch.float64))
