"""Colour kernels against Pillow and torchvision, which the released models were trained with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from dinov3.data import kernels
from dinov3.data.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, Distortion, stack_distortions

FACTORS = [0.6, 0.83, 1.0, 1.17, 1.4]
TURNS = [-0.1, -0.033, 0.0, 0.05, 0.1]


def pictures() -> dict[str, Image.Image]:
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:64, :80]
    smooth = np.stack([rows * 4 - 1, columns * 3, 255 - rows * 2 - columns], axis=-1).clip(0, 255)
    return {
        "noise": Image.fromarray(rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)),
        "smooth": Image.fromarray(smooth.astype(np.uint8)),
        "grey": Image.fromarray(np.repeat(rng.integers(0, 256, (64, 80, 1), dtype=np.uint8), 3, axis=2)),
    }


PICTURES = pictures()


def levels(picture: Image.Image) -> Tensor:
    return F.pil_to_tensor(picture).float().contiguous()


def pillow_blur(picture: Image.Image, sigma: float) -> Image.Image:
    return F.gaussian_blur(picture, [9, 9], [sigma, sigma])


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize(
    ("kernel", "reference", "values", "largest"),
    [
        (kernels.brightness_, F.adjust_brightness, FACTORS, 0),
        (kernels.contrast_, F.adjust_contrast, FACTORS, 1),
        (kernels.saturation_, F.adjust_saturation, FACTORS, 1),
        (kernels.gaussian_blur, pillow_blur, [0.1, 0.35, 0.8, 2.0], 1),
        (lambda image, _: kernels.grayscale_(image), lambda image, _: F.rgb_to_grayscale(image, 3), [0], 1),
        (lambda image, _: kernels.solarize_(image), lambda image, _: F.solarize(image, 128), [0], 0),
    ],
    ids=["brightness", "contrast", "saturation", "blur", "grayscale", "solarize"],
)
def test_operations_agree_with_pillow_to_a_level(
    name: str, kernel: Callable[..., Tensor], reference: Callable[..., Any], values: list[float], largest: int
) -> None:
    for value in values:
        difference = kernel(levels(PICTURES[name]), value) - levels(reference(PICTURES[name], value))
        assert difference.abs().max() <= largest
        assert difference.abs().mean() < 0.1


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("turns", TURNS)
def test_hue_agrees_with_pillow_on_average(name: str, turns: float) -> None:
    ours, theirs = kernels.hue_(levels(PICTURES[name]), turns), levels(F.adjust_hue(PICTURES[name], turns))
    # Pillow rounds the saturation to 8 bits, which we don't: single pixels differ by a few levels.
    assert (ours - theirs).abs().mean() < 0.3
    assert (ours - theirs).abs().max() <= 8


@pytest.mark.parametrize("name", PICTURES)
def test_turned_hues_are_distributed_as_with_pillow(name: str) -> None:
    """Kolmogorov-Smirnov distance of the grey levels of each channel, over turns drawn as in training."""
    torch.manual_seed(0)
    turns = torch.empty(20).uniform_(-0.1, 0.1).tolist()
    ours = torch.stack([kernels.hue_(levels(PICTURES[name]), turn) for turn in turns])
    theirs = torch.stack([levels(F.adjust_hue(PICTURES[name], turn)) for turn in turns])
    for channel in range(3):
        counts = [torch.histc(images[:, channel], bins=256, min=-0.5, max=255.5) for images in (ours, theirs)]
        shares = [(count / count.sum()).cumsum(0) for count in counts]
        assert (shares[0] - shares[1]).abs().max() < 0.01


def test_exact_hue_keeps_value_and_turns_back() -> None:
    image = levels(PICTURES["noise"])
    turned = kernels.hue_(image.clone(), 0.3, whole=False)
    torch.testing.assert_close(turned.amax(0), image.amax(0))
    torch.testing.assert_close(turned.amin(0), image.amin(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(kernels.hue_(turned, -0.3, whole=False), image, atol=1e-2, rtol=0)
    assert (
        kernels.hue_(torch.tensor([200.0, 10, 10]).view(3, 1, 1), 1 / 3, whole=False).flatten()
        - torch.tensor([10.0, 200, 10])
    ).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("kernel", "values"),
    [
        (kernels.brightness_, FACTORS),
        (kernels.contrast_, FACTORS),
        (kernels.saturation_, FACTORS),
        (kernels.hue_, TURNS),
        (kernels.gaussian_blur, [0.2, 0.5, 1.0, 1.5, 2.0]),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_batch_with_a_factor_each_equals_single_images(
    kernel: Callable[..., Tensor], values: list[float], whole: bool
) -> None:
    images = torch.randint(0, 256, (len(values), 3, 20, 24)).float()
    batch = kernel(images.clone(), torch.tensor(values).view(-1, 1, 1, 1), whole=whole)
    single = torch.stack(
        [kernel(image.clone(), value, whole=whole) for image, value in zip(images, values, strict=True)]
    )
    difference = (batch - single).abs()
    assert difference.max() <= (1.001 if whole else 0.01)  # a sum rounded otherwise may cross a whole number
    assert (difference > 0.5).float().mean() < 0.01


def test_distorting_a_batch_equals_distorting_its_images() -> None:
    orders = torch.stack([torch.randperm(4) for _ in range(12)]).tolist()
    factors = {BRIGHTNESS: 1.3, CONTRAST: 0.7, SATURATION: 1.1, HUE: 0.06}
    distortions = [
        Distortion(
            jitter=tuple((operation, factors[operation]) for operation in order) if i % 4 else (),
            grayscale=i % 5 == 0,
            blur_sigma=0.3 * (i % 3),
            solarize=i % 2 == 0,
        )
        for i, order in enumerate(orders)
    ]
    images = torch.randint(0, 256, (12, 3, 24, 24)).float()
    batch = kernels.distort_batch_(images.clone(), stack_distortions(distortions))
    single = torch.stack([kernels.distort_(image.clone(), d) for image, d in zip(images, distortions, strict=True)])
    assert ((batch - single).abs() > 2).float().mean() < 0.01


def test_images_of_other_than_three_channels_keep_their_channels_apart() -> None:
    image = torch.rand(5, 16, 16) * 255
    everything = Distortion(jitter=((HUE, 0.1), (SATURATION, 1.2), (BRIGHTNESS, 0.5)), grayscale=True)
    torch.testing.assert_close(kernels.distort_(image.clone(), everything, whole=False), image * 0.5)
    batch = kernels.distort_batch_(image[None].clone(), stack_distortions([everything]), whole=False)
    torch.testing.assert_close(batch[0], image * 0.5)


def test_fine_levels_are_not_rounded() -> None:
    image = torch.full((3, 12, 12), 100.25)
    blurred = kernels.gaussian_blur(image.clone(), 1.0, whole=False)
    torch.testing.assert_close(blurred, image)
    torch.testing.assert_close(kernels.brightness_(image.clone(), 1.01, whole=False), image * 1.01)
