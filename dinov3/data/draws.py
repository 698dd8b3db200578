"""What is random in a crop, drawn before any pixel is read.

Owns the step from the chains of `augmentations.py` (torchvision transforms, the one description of probabilities and
ranges) to plain parameters. Draws are those that the chains make themselves, in their order, so an image augmented from
parameters looks like one that went through the chains.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from dinov3.data.transforms import GaussianBlur

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_FACTORS = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")


@dataclass(frozen=True)
class Geometry:
    """A box of the image, in pixels of the full image, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


@dataclass(frozen=True)
class Distortion:
    """What happens to the colours of a crop.

    Attributes:
        jitter: (operation, factor) pairs in their order: `BRIGHTNESS`, `CONTRAST`, `SATURATION`, `HUE`.
        grayscale: then to shades of grey.
        blur_sigma: of the Gaussian, px; 0: no blur.
        solarize: then invert values above the threshold.
    """

    jitter: tuple[tuple[int, float], ...] = ()
    grayscale: bool = False
    blur_sigma: float = 0.0
    solarize: bool = False


def draw_geometry(chain: v2.Compose, height: int, width: int) -> Geometry:
    """The draws of `RandomResizedCrop` and `RandomHorizontalFlip` on an image of that size."""
    crop, flip = chain.transforms
    box = crop.make_params([torch.empty(3, height, width, device="meta")])
    return Geometry(**box, flip=_happens(flip.p))


def draw_distortion(chain: v2.Compose) -> Distortion:
    """The draws of a chain of colour jitter, grayscale, blur and solarization; other steps draw nothing."""
    drawn: dict[str, Any] = {}
    for step in _steps(chain):
        if isinstance(step, GaussianBlur):
            if _happens(step.p):
                drawn["blur_sigma"] = step.transforms[0].make_params([])["sigma"][0]
        elif isinstance(step, v2.RandomApply):
            if _happens(step.p):
                drawn["jitter"] = _jitter(step.transforms[0].make_params([]))
        elif isinstance(step, v2.RandomGrayscale):
            drawn["grayscale"] = _happens(step.p)
        elif isinstance(step, v2.RandomSolarize):
            drawn["solarize"] = _happens(step.p)
    return Distortion(**drawn)


def stack_distortions(distortions: Sequence[Distortion]) -> dict[str, Tensor]:
    """Distortions as tensors with one row each, which loaders can move.

    Returns:
        `order` int64 [n, 4], the operations, -1 for none; `factors` float32 [n, 4]; `grayscale` bool [n]; `blur_sigma`
        float32 [n]; `solarize` bool [n].
    """
    n = len(distortions)
    order, factors = torch.full((n, 4), -1), torch.ones(n, 4)
    for i, distortion in enumerate(distortions):
        for j, (operation, factor) in enumerate(distortion.jitter):
            order[i, j], factors[i, j] = operation, factor
    return {
        "order": order,
        "factors": factors,
        "grayscale": torch.tensor([d.grayscale for d in distortions], dtype=torch.bool),
        "blur_sigma": torch.tensor([d.blur_sigma for d in distortions], dtype=torch.float32),
        "solarize": torch.tensor([d.solarize for d in distortions], dtype=torch.bool),
    }


def _happens(p: float) -> bool:
    return bool(torch.rand(1) < p)


def _jitter(params: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    return tuple((operation, params[_FACTORS[operation]]) for operation in params["fn_idx"].tolist())


def _steps(chain: v2.Compose) -> list[Any]:
    """The steps of a chain, those of chains within it in their place."""
    steps: list[Any] = []
    for step in chain.transforms:
        steps += _steps(step) if isinstance(step, v2.Compose) else [step]
    return steps
