from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dinov3.data.transforms import (
    GaussianBlur,
    get_target_transform,
    make_classification_eval_transform,
    make_classification_train_transform,
    make_eval_transform,
    make_interpolation_mode,
    make_resize_transform,
)
from tests.helpers.images import class_image


@pytest.mark.parametrize(("p", "effective"), [(1.0, 0.0), (0.1, 0.9), (0.5, 0.5), (0.0, 1.0)])
def test_gaussian_blur_applies_with_probability_one_minus_p(p: float, effective: float) -> None:
    blur = GaussianBlur(p=p, radius_min=1.0)
    assert blur.p == pytest.approx(effective)
    picture = class_image(0, 0, size=12)
    n = 300
    rate = sum(blur(picture).tobytes() != picture.tobytes() for _ in range(n)) / n
    assert rate == pytest.approx(effective, abs=5 * (effective * (1 - effective) / n) ** 0.5)


def test_gaussian_blur_refuses_other_than_probabilities() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\], got 9"):
        GaussianBlur(p=9)


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_interpolation_modes_are_found_by_value(name: str) -> None:
    assert make_interpolation_mode(name).value == name


def test_an_unknown_interpolation_mode_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match="unknown interpolation mode 'cubic'; known: nearest.*bicubic"):
        make_interpolation_mode("cubic")


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, (30, 60)), ({"resize_square": True}, (30, 30)), ({"resize_large_side": True}, (15, 30))],
)
def test_resizing_takes_one_side_or_both(options: dict[str, bool], expected: tuple[int, int]) -> None:
    assert make_resize_transform(resize_size=30, **options)(torch.zeros(3, 40, 80)).shape[1:] == expected


def test_resizing_refuses_both_flags() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        make_resize_transform(resize_size=30, resize_square=True, resize_large_side=True)


@pytest.mark.parametrize("crop_size", [None, 0])
def test_no_crop_keeps_the_resized_image(crop_size: int | None) -> None:
    picture = Image.new("RGB", (80, 40))
    assert make_eval_transform(resize_size=20, crop_size=crop_size)(picture).shape == (3, 20, 40)


def test_a_crop_larger_than_the_image_pads_with_black() -> None:
    transform = make_classification_eval_transform(resize_size=8, crop_size=12, mean=(0.5, 0.5, 0.5), std=(1, 1, 1))
    out = transform(Image.new("RGB", (20, 20), "white"))
    assert out.dtype == torch.float32
    assert out[:, 0].unique().tolist() == [-0.5]
    assert out[:, 6, 6].tolist() == [0.5] * 3


def test_the_training_transform_flips_only_if_asked() -> None:
    picture = class_image(0, 0)
    assert make_classification_train_transform(crop_size=16)(picture).shape == (3, 16, 16)
    plain = make_classification_train_transform(crop_size=16, hflip_prob=0.0)
    assert not any(isinstance(step, v2.RandomHorizontalFlip) for step in plain.transforms)


def test_multi_label_targets_are_multi_hot() -> None:
    voc = get_target_transform("VOC2007:split=TRAIN")
    assert voc is not None
    target = voc(SimpleNamespace(instances=[SimpleNamespace(category_id=c) for c in (3, 3, 19)]))
    assert target.nonzero().flatten().tolist() == [3, 19]
    assert (target.dtype, target.shape) == (torch.int64, (20,))

    materials = get_target_transform("IMaterialist:root=/x")
    assert materials is not None
    assert materials(SimpleNamespace(attributes=[0, 293])).nonzero().flatten().tolist() == [0, 293]
    assert get_target_transform("ImageNet:split=TRAIN") is None
