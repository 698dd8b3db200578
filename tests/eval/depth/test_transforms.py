"""Transforms keep image and depth together, in metres and float32."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.eval.depth.transforms import (
    ColorAug,
    Depth,
    LeftRightFlipAug,
    NYUCrop,
    TrainDraw,
    make_depth_eval_transforms,
    make_depth_train_transforms,
)

NO_CHANGE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def coded(height: int = 48, width: int = 64) -> tuple[Image.Image, Image.Image]:
    """An image and a depth map in millimetres that hold the same numbers: smooth, from 1 to 3 m."""
    rows, columns = np.mgrid[0:height, 0:width]
    code = 100 + rows + columns  # up to 210
    return (
        Image.fromarray(np.repeat(code[..., None], 3, axis=-1).astype(np.uint8)),
        Image.fromarray((10 * code).astype(np.uint16)),
    )


@pytest.mark.parametrize("angle", [None, 5.0])
@pytest.mark.parametrize("flip", [False, True])
def test_image_and_depth_stay_together(angle: float | None, flip: bool) -> None:
    transform = make_depth_train_transforms(normalization_constant=1000.0, random_crop_size=(24, 32), **NO_CHANGE)  # type: ignore[arg-type]
    pair = transform.prepare(*coded())
    image, depth = transform.apply(pair, TrainDraw(angle, flip, (10, 14), None))
    assert image.shape == (3, 24, 32)
    assert depth.shape == (1, 24, 32)
    torch.testing.assert_close(image[:1] * 2.55, depth, rtol=0, atol=0.03)  # a pixel is 0.01 m


def test_draws_are_reproducible_and_of_the_right_kind() -> None:
    transform = make_depth_train_transforms(normalization_constant=1000.0, random_crop_size=(24, 32))
    torch.manual_seed(5)
    first = [transform(*coded()) for _ in range(4)]
    torch.manual_seed(5)
    second = [transform(*coded()) for _ in range(4)]
    for (image, depth), (again, depth_again) in zip(first, second, strict=True):
        torch.testing.assert_close(image, again, rtol=0, atol=0)
        torch.testing.assert_close(depth, depth_again, rtol=0, atol=0)
        assert image.dtype == depth.dtype == torch.float32
        assert type(image) is type(depth) is torch.Tensor
    assert len({float(image.sum()) for image, _ in first}) == 4
    draws = [transform.draw(48, 64) for _ in range(400)]
    assert 0.4 < sum(d.angle is not None for d in draws) / 400 < 0.6
    assert 0.4 < sum(d.flip for d in draws) / 400 < 0.6
    assert max(abs(d.angle) for d in draws if d.angle is not None) <= 2.5
    assert {d.crop[0] for d in draws if d.crop} == set(range(25))
    assert all(0.9 <= c <= 1.1 for d in draws if d.colour for c in (d.colour.gamma, *d.colour.channels))


def test_no_crop_images_of_two_sizes_and_small_images() -> None:
    plain = make_depth_train_transforms(random_crop_size=None)
    assert plain(*coded())[0].shape == (3, 48, 64)
    image, depth = coded()
    with pytest.raises(ValueError, match="set transforms.train.img_size"):
        plain(image, depth.resize((32, 24)))
    resized = make_depth_train_transforms(random_crop_size=None, img_size=24)
    assert [x.shape[-2:] for x in resized(image, depth.resize((32, 24)))] == [(24, 32)] * 2
    with pytest.raises(ValueError, match="smaller than transforms.train.random_crop"):
        make_depth_train_transforms(random_crop_size=(64, 64))(image, depth)


def test_depth_in_metres_is_not_divided_again() -> None:
    image, depth = coded()
    metres = Depth(torch.from_numpy(np.asarray(depth).astype(np.float32))[None] / 1000)
    transform = make_depth_eval_transforms(normalization_constant=1000.0)
    for given in (metres, depth, np.asarray(depth)):
        _, (label,) = transform(image, given)
        torch.testing.assert_close(label, metres.as_subclass(torch.Tensor))
        assert type(label) is torch.Tensor


def test_views_of_test_time_augmentation() -> None:
    images, depths = make_depth_eval_transforms(tta=True)(*coded())
    torch.testing.assert_close(images[1], images[0].flip(-1))
    torch.testing.assert_close(depths[1], depths[0].flip(-1))
    views = LeftRightFlipAug()
    stacked = torch.stack(images)
    torch.testing.assert_close(views.inverse(stacked), stacked[:1])
    assert len(LeftRightFlipAug(flip=False)(images[0], depths[0])[0]) == 1


def test_nyu_crop_is_the_same_for_pictures_and_tensors() -> None:
    image, _ = coded(480, 640)
    cropped = NYUCrop()(image)
    assert cropped.size == (565, 427)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    np.testing.assert_array_equal(np.asarray(cropped), NYUCrop()(tensor).permute(1, 2, 0).numpy())


def test_colours_are_float32_and_sometimes_left_alone() -> None:
    image = torch.rand(3, 4, 4)
    augment = ColorAug(brightness_range=(0.5, 0.6))
    results = [augment(image) for _ in range(50)]
    unchanged = sum(bool(result is image) for result in results)
    assert 10 < unchanged < 40
    assert all(result.dtype == torch.float32 and 0 <= result.min() <= result.max() <= 1 for result in results)


def test_options_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="normalization_constant must be larger"):
        make_depth_eval_transforms(normalization_constant=0.0)
    with pytest.raises(ValueError, match="unknown fixed_crop 'KITTI'; known: FULL, NYU"):
        make_depth_eval_transforms(fixed_crop="KITTI")
    with pytest.raises(ValueError, match="img_size"):
        make_depth_eval_transforms(img_size=[1, 2, 3])
    with pytest.raises(ValueError, match="random_crop is"):
        make_depth_train_transforms(random_crop_size=(3,))
    with pytest.raises(ValueError, match="brightness_range"):
        make_depth_train_transforms(brightness_range=(1.2, 0.8))
