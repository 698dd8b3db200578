"""Multi-crop augmentation for self-supervised training.

Owns the crops, distortions, their probabilities and the order of their random draws (torch's global generator, and
NumPy's for the offsets of subset mode), and the path `pil`, on which images stay PIL images until they are normalised,
so resampling and colour are Pillow's. The other paths are in `tensor_augmentation.py`.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from dinov3.data.datasets.decoders import EncodedImage
from dinov3.data.tensor_augmentation import TensorAugmentation
from dinov3.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, GaussianBlur, make_base_transform

logger = logging.getLogger("dinov3")

_ASPECT_RATIO = (3 / 4, 4 / 3)
PATHS = ("pil", "tensor", "device")


class DataAugmentationDINO:
    """Two global crops and several local ones of an image, independently distorted.

    Args:
        global_crops_scale, local_crops_scale: ranges of the crops' area as a share of the image's.
        local_crops_number: local crops per image.
        global_crops_size, local_crops_size: sides of the crops, px.
        gram_teacher_crops_size: side of the additional crops for the Gram teacher, px; None: no such crops.
        gram_teacher_no_distortions: those crops keep the image's colours.
        teacher_no_color_jitter: undistorted crops for the teacher. They keep the side
            `max(global_crops_size, gram_teacher_crops_size)` of the geometry.
        local_crops_subset_of_global_crops: cut the local crops out of the global ones, on the patch grid: half of them
            from each (so an odd number loses one, with a logged warning; `n_local_crops` is the number that come out).
        patch_size: of that grid, px.
        share_color_jitter: colour jitter once per image instead of once per crop.
        horizontal_flips: flip each crop with probability 0.5.
        mean, std: of the normalisation.
        augmentation: who computes, on the same draws. "pil": Pillow and torchvision, as the released models were
            trained. "tensor": tensors, several times faster; within two grey levels of that, hue within three on
            average. "device": the same, but distortions and normalisation are left to `DeviceAugmentation`, in batches.

    Raises:
        ValueError: impossible sizes or ranges, or an unknown path.

    Source: DINO (arXiv:2104.14294), section 3.1; DINOv3 (arXiv:2508.10104), section 4 for the Gram teacher's crops.
    """

    def __init__(
        self,
        global_crops_scale: Sequence[float],
        local_crops_scale: Sequence[float],
        local_crops_number: int,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        gram_teacher_crops_size: int | None = None,
        gram_teacher_no_distortions: bool = False,
        teacher_no_color_jitter: bool = False,
        local_crops_subset_of_global_crops: bool = False,
        patch_size: int = 16,
        share_color_jitter: bool = False,
        horizontal_flips: bool = True,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        augmentation: str = "pil",
    ) -> None:
        if augmentation not in PATHS:
            raise ValueError(f"augmentation must be one of {', '.join(PATHS)}, got {augmentation!r}")
        self.augmentation = augmentation
        self.global_crops_scale = _area_range("global_crops_scale", global_crops_scale)
        self.local_crops_scale = _area_range("local_crops_scale", local_crops_scale)
        self.global_crops_size = _side("global_crops_size", global_crops_size)
        self.local_crops_size = _side("local_crops_size", local_crops_size)
        self.gram_teacher_crops_size = (
            None if gram_teacher_crops_size is None else _side("gram_teacher_crops_size", gram_teacher_crops_size)
        )
        if local_crops_number < 0:
            raise ValueError(f"local_crops_number must not be negative, got {local_crops_number}")
        self.local_crops_number = local_crops_number
        self.gram_teacher_no_distortions = gram_teacher_no_distortions
        self.teacher_no_color_jitter = teacher_no_color_jitter
        self.local_crops_subset_of_global_crops = local_crops_subset_of_global_crops
        self.patch_size = patch_size
        self.share_color_jitter = share_color_jitter
        self.horizontal_flips = horizontal_flips
        self.mean, self.std = mean, std
        if local_crops_subset_of_global_crops:
            self._check_subset_mode()
        self._build()
        self._tensors = None if augmentation == "pil" else TensorAugmentation(self, on_device=augmentation == "device")

    @property
    def takes_encoded(self) -> bool:
        """Whether datasets should leave the decoding to this transform (see `ExtendedVisionDataset`)."""
        return self._tensors is not None

    @property
    def geometry_size(self) -> int:
        """Side of the views that global crops and the Gram teacher's crops are made of, px."""
        return max(self.global_crops_size, self.gram_teacher_crops_size or 0)

    @property
    def n_local_crops(self) -> int:
        """Local crops that come out per image."""
        if self.local_crops_subset_of_global_crops:
            return self.local_crops_number // 2 * 2
        return self.local_crops_number

    def _check_subset_mode(self) -> None:
        room = self.global_crops_size - self.local_crops_size
        if self.patch_size < 1 or room < self.patch_size:
            raise ValueError(
                "local crops that are part of the global ones need at least one patch of room: global_crops_size "
                f"{self.global_crops_size} - local_crops_size {self.local_crops_size} = {room} px, patch_size is "
                f"{self.patch_size} px"
            )
        if self.local_crops_number % 2:
            logger.warning(
                f"local_crops_number = {self.local_crops_number} is odd: each of the two global crops gives "
                f"{self.local_crops_number // 2} local crops, so {self.n_local_crops} in all"
            )

    def _build(self) -> None:
        """The chains. Blur probabilities are written as the effective ones: `GaussianBlur(p)` blurs with 1 - p."""
        self.geometric_augmentation_global = self._geometry(self.geometry_size, self.global_crops_scale)
        self.geometric_augmentation_local = self._geometry(self.local_crops_size, self.local_crops_scale)

        self.color_jittering = v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
            ]
        )
        self.normalize = v2.Compose([v2.ToImage(), make_base_transform(mean=self.mean, std=self.std)])

        # With a Gram teacher the geometry may be larger than a global crop. Without distortions of the Gram crops,
        # global crops shrink before they are distorted; with, afterwards, because the Gram crops are made of the
        # distorted ones.
        to_global_size = v2.Resize(self.global_crops_size, interpolation=InterpolationMode.BICUBIC)
        has_gram = self.gram_teacher_crops_size is not None
        resize_before = to_global_size if has_gram and self.gram_teacher_no_distortions else nn.Identity()
        self.resize_global_after = (
            to_global_size if has_gram and not self.gram_teacher_no_distortions else nn.Identity()
        )
        self.resize_gram_teacher = (
            v2.Resize(self.gram_teacher_crops_size, interpolation=InterpolationMode.BICUBIC) if has_gram else None
        )
        # Local crops that are cut out of a global one: offsets count pixels of the global size.
        self.resize_subset_source = to_global_size if self.geometry_size > self.global_crops_size else nn.Identity()

        colour = [] if self.share_color_jitter else [self.color_jittering]
        never_blur = GaussianBlur(p=1.0)  # effective probability 0.0
        nearly_always_blur = GaussianBlur(p=0.1)  # effective probability 0.9
        blur_half_the_time = GaussianBlur(p=0.5)  # effective probability 0.5
        solarize = v2.RandomSolarize(threshold=128, p=0.2)
        self.global_transfo1 = v2.Compose([resize_before, *colour, never_blur, self.normalize])
        self.global_transfo2 = v2.Compose([resize_before, *colour, nearly_always_blur, solarize, self.normalize])
        self.local_transfo = v2.Compose([*colour, blur_half_the_time, self.normalize])

    def _geometry(self, size: int, scale: tuple[float, float]) -> v2.Compose:
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=scale, ratio=_ASPECT_RATIO, interpolation=InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(p=0.5 if self.horizontal_flips else 0.0),
            ]
        )

    def __call__(self, image: Image.Image | EncodedImage | Tensor) -> dict[str, Any]:
        """Augment one RGB image.

        On the paths other than "pil" it may be encoded, or a tensor [C, H, W] with any number of channels, uint8 or
        float in [0, 1].

        Returns:
            `weak_flag`: True. `global_crops`: 2 float32 tensors [3, G, G]. `global_crops_teacher`: the same two
            objects, or undistorted ones. `gram_teacher_crops`: 2 tensors [3, T, T], only if a size was given.
            `local_crops`: tensors [3, L, L]. `offsets`: (), or the (row, column) of each local crop in its global
            one, px. With "device", crops are grey levels, and `distortions` holds what is left to do.
        """
        if self._tensors is not None:
            return self._tensors(image)
        if isinstance(image, Tensor) and image.shape[-3] != 3:
            raise ValueError(f"augmentation='pil' takes RGB images, got {image.shape[-3]} channels: use 'tensor'")
        # Order of the draws: [shared colour], geometry and distortion of crop 1, of crop 2, of each local crop.
        if self.share_color_jitter:
            image = self.color_jittering(image)
        views, distorted = [], []
        for distort in (self.global_transfo1, self.global_transfo2):
            views.append(self.geometric_augmentation_global(image))
            distorted.append(distort(views[-1]))
        global_crops = [self.resize_global_after(crop) for crop in distorted]

        output: dict[str, Any] = {"weak_flag": True, "global_crops": global_crops}
        output["global_crops_teacher"] = (
            [self.normalize(view) for view in views] if self.teacher_no_color_jitter else global_crops
        )
        if self.resize_gram_teacher is not None:
            output["gram_teacher_crops"] = (
                [self.normalize(self.resize_gram_teacher(view)) for view in views]
                if self.gram_teacher_no_distortions
                else [self.resize_gram_teacher(crop) for crop in distorted]
            )
        if self.local_crops_subset_of_global_crops:
            output["local_crops"], output["offsets"] = self._local_crops_of(views)
        else:
            output["local_crops"] = [
                self.local_transfo(self.geometric_augmentation_local(image)) for _ in range(self.local_crops_number)
            ]
            output["offsets"] = ()
        return output

    def _local_crops_of(self, views: Sequence[Image.Image]) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Distort each global view anew for every local crop, then cut that out at a random place of the patch grid."""
        distorted = [
            self.local_transfo(self.resize_subset_source(view))
            for view in views
            for _ in range(self.local_crops_number // 2)
        ]
        return self.cut_local_crops(distorted)

    def cut_local_crops(self, distorted: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """A local crop of each global crop, at a random place of the patch grid, and the (row, column) of that."""
        size = self.local_crops_size
        # The upper bound is excluded, so the last place of the grid is never drawn: kept, with the draws.
        n_places = (self.global_crops_size - size) // self.patch_size
        crops, offsets = [], []
        for image in distorted:
            row, column = (np.random.randint(0, n_places, 2) * self.patch_size).tolist()
            crops.append(image[:, row : row + size, column : column + size])
            offsets.append((row, column))
        return crops, offsets


def _area_range(name: str, scale: Sequence[float]) -> tuple[float, float]:
    values = tuple(scale)
    if len(values) != 2 or not 0 < values[0] <= values[1] <= 1:
        raise ValueError(f"{name} must be two areas with 0 < smallest <= largest <= 1, got {scale!r}")
    return values


def _side(name: str, size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name} must be a positive number of pixels, got {size!r}")
    return size
