"""The quick paths of the multi-crop augmentation: `tensor` and, up to its distortions, `device`.

All draws are made first. Then the image is decoded once, at reduced scale if every crop is large enough for that; a
crop is cut out before it is resized (torchvision's uint8 kernels), and colours change in float32 (`kernels.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import PIL
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from dinov3.data.datasets.decoders import EncodedImage
from dinov3.data.draws import Distortion, Geometry, draw_distortion, draw_geometry, stack_distortions
from dinov3.data.kernels import distort_

if TYPE_CHECKING:
    from dinov3.data.augmentations import DataAugmentationDINO

# A crop is taken from a reduced image only if it has at least so many times the pixels it is resized to, per direction:
# then the reduction can't be told from a change by about a grey level.
_REDUCTION_GAP = 2
_REDUCTIONS = (8, 4, 2)
_PILLOW_CHOOSES_ITS_ORDER = int(PIL.__version__.split(".")[0]) >= 13

Distort = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Draws:
    """All draws of an image but the offsets of subset mode, in their order."""

    shared: Distortion
    views: list[tuple[Geometry, Distortion]]
    local: list[tuple[Geometry | None, Distortion]]  # None: a part of a global view


class TensorAugmentation:
    """Applies a `DataAugmentationDINO` to images as tensors.

    Args:
        options: its chains say what is drawn.
        on_device: leave distortions and normalisation to `DeviceAugmentation`.

    Raises:
        ValueError: options that the device path doesn't have.
    """

    def __init__(self, options: "DataAugmentationDINO", *, on_device: bool) -> None:
        if on_device and (options.local_crops_subset_of_global_crops or options.teacher_no_color_jitter):
            raise ValueError(
                "augmentation='device' has neither local crops cut out of the global ones nor undistorted teacher "
                "crops: use augmentation='tensor'"
            )
        self.options = options
        self.on_device = on_device
        self.finish = CropFinisher(options)

    def __call__(self, image: Image.Image | EncodedImage | Tensor) -> dict[str, Any]:
        """As `DataAugmentationDINO.__call__`; with `on_device`, crops of whole grey levels and `distortions`."""
        options = self.options
        width, height = _size(image)
        draws = self._draw(height, width)
        pixels = _to_tensor(image, self._reduction(draws))
        if draws.shared != Distortion():
            pixels = _as_stored(distort_(_as_float(pixels), draws.shared, whole=is_whole(pixels)), pixels)
        scale = pixels.shape[-2] / height, pixels.shape[-1] / width
        views = [self._cut(pixels, geometry, options.geometry_size, scale) for geometry, _ in draws.views]
        output: dict[str, Any] = {"weak_flag": True}
        if self.on_device:
            output["global_crops"] = output["global_crops_teacher"] = views
        else:
            self._distort_views(views, draws, output)
        output["local_crops"], output["offsets"] = self._local_crops(pixels, views, draws, scale)
        if self.on_device:
            output["distortions"] = {
                "global": stack_distortions([distortion for _, distortion in draws.views]),
                "local": stack_distortions([distortion for _, distortion in draws.local]),
            }
        return output

    def _draw(self, height: int, width: int) -> _Draws:
        options = self.options
        shared = draw_distortion(options.color_jittering) if options.share_color_jitter else Distortion()
        views = [
            (draw_geometry(options.geometric_augmentation_global, height, width), draw_distortion(chain))
            for chain in (options.global_transfo1, options.global_transfo2)
        ]
        local: list[tuple[Geometry | None, Distortion]] = []
        for _ in range(options.n_local_crops):
            geometry = None
            if not options.local_crops_subset_of_global_crops:
                geometry = draw_geometry(options.geometric_augmentation_local, height, width)
            local.append((geometry, draw_distortion(options.local_transfo)))
        return _Draws(shared, views, local)

    def _reduction(self, draws: _Draws) -> int:
        """The largest reduction that leaves every crop enough pixels."""
        crops = [(geometry, self.options.geometry_size) for geometry, _ in draws.views]
        crops += [(geometry, self.options.local_crops_size) for geometry, _ in draws.local if geometry is not None]
        room = min(min(box.height, box.width) / (_REDUCTION_GAP * size) for box, size in crops)
        return next((reduction for reduction in _REDUCTIONS if reduction <= room), 1)

    def _cut(self, pixels: Tensor, geometry: Geometry, size: int, scale: tuple[float, float]) -> Tensor:
        """A resized crop [C, size, size]; `geometry` counts pixels of the full image, `scale` those of this one."""
        (top, bottom), (left, right) = (
            _interval(start * factor, length * factor, n)
            for start, length, factor, n in zip(
                (geometry.top, geometry.left),
                (geometry.height, geometry.width),
                scale,
                pixels.shape[-2:],
                strict=True,
            )
        )
        crop = resize(pixels[:, top:bottom, left:right], size)
        return crop.flip(-1) if geometry.flip else crop

    def _distort_views(self, views: Sequence[Tensor], draws: _Draws, output: dict[str, Any]) -> None:
        finished = [
            self.finish.view(_as_float(view), _distorting(distortion, view))
            for view, (_, distortion) in zip(views, draws.views, strict=True)
        ]
        output["global_crops"] = output["global_crops_teacher"] = [crop for crop, _ in finished]
        if self.options.teacher_no_color_jitter:
            output["global_crops_teacher"] = [self.finish.normalize_(_as_float(view)) for view in views]
        if self.options.gram_teacher_crops_size is not None:
            output["gram_teacher_crops"] = [gram for _, gram in finished]

    def _local_crops(
        self, pixels: Tensor, views: Sequence[Tensor], draws: _Draws, scale: tuple[float, float]
    ) -> tuple[list[Tensor], Any]:
        options = self.options
        if not options.local_crops_subset_of_global_crops:
            crops = [
                self._cut(pixels, geometry, options.local_crops_size, scale)
                for geometry, _ in draws.local
                if geometry is not None
            ]
        else:
            sources = [resize(view, options.global_crops_size) for view in views]
            crops = [sources[i // (options.n_local_crops // 2)] for i in range(options.n_local_crops)]
        if self.on_device:
            return crops, ()
        finished = [
            self.finish.normalize_(_distorting(distortion, crop)(_as_float(crop)))
            for crop, (_, distortion) in zip(crops, draws.local, strict=True)
        ]
        return options.cut_local_crops(finished) if options.local_crops_subset_of_global_crops else (finished, ())


class CropFinisher:
    """From crops of grey levels, float32 [..., C, S, S] in [0, 255], to what the networks see. Writes into its inputs.

    Args:
        options: sizes, what the Gram teacher sees, normalisation.
    """

    def __init__(self, options: "DataAugmentationDINO") -> None:
        self.size = options.global_crops_size
        self.gram_size = options.gram_teacher_crops_size
        self.clean_gram = options.gram_teacher_no_distortions
        self._offset = torch.tensor(options.mean).mul(255).view(-1, 1, 1)
        self._divisor = torch.tensor(options.std).mul(255).view(-1, 1, 1)

    def view(self, view: Tensor, distort: Distort) -> tuple[Tensor, Tensor | None]:
        """The global crop and, if there are any, the Gram teacher's crop of a view."""
        if self.gram_size is None:
            return self.normalize_(distort(view)), None
        if self.clean_gram:
            gram = self.normalize_(resize(view, self.gram_size).clone())
            return self.normalize_(distort(resize(view, self.size))), gram
        distorted = self.normalize_(distort(view))
        return _resize_float(distorted, self.size), _resize_float(distorted, self.gram_size)

    def normalize_(self, crop: Tensor) -> Tensor:
        """Grey levels to what the mean and standard deviation of the options make of them."""
        if crop.shape[-3] != self._offset.shape[0]:
            raise ValueError(
                f"images have {crop.shape[-3]} channels, but mean and std have {self._offset.shape[0]}: give one entry "
                "per channel (crops.rgb_mean, crops.rgb_std; student.in_chans)"
            )
        return crop.sub_(self._offset.to(crop.device)).div_(self._divisor.to(crop.device))


def resize(image: Tensor, size: int) -> Tensor:
    """Grey levels [..., C, H, W] -> [..., C, size, size], antialiased bicubic, cut to [0, 255]."""
    if image.shape[-2:] == (size, size):
        return image
    if not is_whole(image):
        return _resize_float(image, size).clamp(0, 255)
    if _columns_first(image.shape[-2], image.shape[-1], size):
        return _resize_float(image.mT, size).mT
    return _resize_float(image, size)


def _columns_first(height: int, width: int, size: int) -> bool:
    """Whether Pillow resizes the columns before the rows. Each pass rounds to whole levels, so it makes a difference.

    The rule of Pillow 13 was found by comparing results; earlier ones, like torchvision, always begin with the rows.
    """
    return _PILLOW_CHOOSES_ITS_ORDER and height - size > 2 * max(width - size, 0)


def _resize_float(image: Tensor, size: int) -> Tensor:
    return F.resize(image, [size, size], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)


def _size(image: Image.Image | EncodedImage | Tensor) -> tuple[int, int]:
    """(width, height) in pixels."""
    if isinstance(image, EncodedImage):
        return image.size()
    return (image.shape[-1], image.shape[-2]) if isinstance(image, Tensor) else image.size


def _to_tensor(image: Image.Image | EncodedImage | Tensor, reduction: int) -> Tensor:
    """Grey levels [C, H, W]: uint8, or float32 in [0, 255] of a float image in [0, 1]."""
    if isinstance(image, EncodedImage):
        image = image.decode(reduction)
    if isinstance(image, Image.Image):
        return F.pil_to_tensor(image)
    image = image.as_subclass(Tensor)
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise TypeError(f"image tensors must be uint8, or float in [0, 1], got {image.dtype}")
    return image.to(torch.float32) * 255


def _as_float(pixels: Tensor) -> Tensor:
    """A contiguous float32 copy."""
    return pixels.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _as_stored(pixels: Tensor, like: Tensor) -> Tensor:
    return pixels.to(like.dtype)


def is_whole(pixels: Tensor) -> bool:
    """Whether values are whole grey levels, which operations then keep."""
    return not pixels.is_floating_point()


def _distorting(distortion: Distortion, like: Tensor) -> Distort:
    return lambda crop: distort_(crop, distortion, whole=is_whole(like))


def _interval(start: float, length: float, n: int) -> tuple[int, int]:
    """The pixels, of n, that are closest to those from `start` on; at least one."""
    first = min(round(start), n - 1)
    return first, min(max(math.floor(start + length + 0.5), first + 1), n)
