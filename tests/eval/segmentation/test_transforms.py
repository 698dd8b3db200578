"""Training and evaluation transforms: image and label stay together, at every size; bad settings are named."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.eval.segmentation import transforms
from dinov3.eval.segmentation.transforms import (
    label_tensor,
    make_segmentation_eval_transforms,
    make_segmentation_train_transforms,
    normalize,
)

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def scene(height: int, width: int) -> tuple[Image.Image, Image.Image]:
    """An image whose pixels are ten times their label; labels are columns of 8 pixels, 0 to 5."""
    labels = np.tile((np.arange(width) // 8 % 6).astype(np.uint8), (height, 1))
    return Image.fromarray(np.repeat((labels * 10)[..., None], 3, axis=-1)), Image.fromarray(labels)


@pytest.fixture
def no_colour_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "distort_colours", lambda pixels: pixels)


@pytest.mark.usefixtures("no_colour_changes")
@pytest.mark.parametrize("size", [(40, 64), (64, 40), (20, 20), (1, 200)])
def test_image_and_label_show_the_same_place(size: tuple[int, int]) -> None:
    from torchvision.transforms.v2 import InterpolationMode

    transform = make_segmentation_train_transforms(
        img_size=32,
        random_img_size_ratio_range=(0.5, 2),
        crop_size=(24, 32),
        flip_prob=0.5,
        image_interpolation=InterpolationMode.NEAREST,
        mean=MEAN,
        std=STD,
    )
    for _ in range(10):
        image, label = transform(*scene(*size))
        assert (image.shape, label.shape, label.dtype) == ((3, 24, 32), (1, 24, 32), torch.uint8)
        inside = label != 255
        # Pillow's nearest pixel and torch's may differ by one column.
        difference = (image[0] - 10 * label[0].float())[inside[0]].abs()
        assert (difference > 0).float().mean() < 0.2
        assert not image[:, ~inside[0]].any()


def test_small_images_are_filled_up_after_normalisation() -> None:
    transform = make_segmentation_train_transforms(crop_size=(16, 16))
    image, label = transform(*scene(6, 8))
    assert (label[0, 6:] == 255).all()
    assert (label[0, :, 8:] == 255).all()
    assert (label[0, :6, :8] != 255).all()
    assert not image[:, 6:].any()
    assert not image[:, :, 8:].any()


def test_crops_avoid_one_class_if_they_can() -> None:
    labels = np.zeros((32, 64), dtype=np.uint8)
    labels[:, 56:] = 1  # few crops of 16 see it
    image = Image.fromarray(np.zeros((32, 64, 3), dtype=np.uint8))
    transform = make_segmentation_train_transforms(crop_size=(16, 16))
    np.random.seed(0)
    seen = sum(bool((transform(image, labels)[1] == 1).any()) for _ in range(50))
    assert seen > 20  # in one of twelve places there is enough of both


def test_zero_is_reduced_before_the_crop() -> None:
    labels = np.array([[0, 1], [150, 255]], dtype=np.uint8)
    transform = make_segmentation_train_transforms(reduce_zero_label=True)
    label = transform(Image.new("RGB", (2, 2)), labels)[1]
    assert label.tolist() == [[[255, 0], [149, 255]]]


@pytest.mark.parametrize("values", [300, 70_000])
def test_wide_labels_keep_their_values(values: int) -> None:
    labels = np.full((8, 8), values, dtype=np.uint16 if values < 2**16 else np.int32)
    for label in (labels, Image.fromarray(labels)):
        mask = make_segmentation_eval_transforms(img_size=4)(Image.new("RGB", (8, 8)), label)[1]
        assert (mask.unique().tolist(), mask.shape) == ([values], (1, 4, 4))


def test_views_come_with_their_mirror_images_last() -> None:
    image, label = scene(40, 60)
    transform = make_segmentation_eval_transforms(
        img_size=32, inference_mode="slide", use_tta=True, tta_ratios=(0.5, 1.0, 1.5), mean=MEAN, std=STD
    )
    views, mask = transform(image, label)
    assert [tuple(view.shape[1:]) for view in views] == [(32, 48), (32, 48), (48, 72)] * 2
    for view, mirrored in zip(views[:3], views[3:], strict=True):
        torch.testing.assert_close(view.flip(-1), mirrored, rtol=0, atol=0)
    assert mask.shape == (1, 40, 60)


def test_without_a_size_images_stay_as_they_are() -> None:
    image, label = scene(21, 34)
    (view,), mask = make_segmentation_eval_transforms()(image, label)
    assert (view.shape, mask.shape) == ((3, 21, 34), (1, 21, 34))
    expected = normalize(
        torch.from_numpy(np.array(image)).permute(2, 0, 1), transforms.DEFAULT_MEAN, transforms.DEFAULT_STD
    )
    torch.testing.assert_close(view, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"img_size": 0}, "img_size is a number of pixels"),
        ({"img_size": (3, 4, 5)}, "img_size is a number of pixels"),
        ({"crop_size": 32}, r"crop_size is \(height, width\), got 32"),
        ({"img_size": (8, 8), "random_img_size_ratio_range": (0.5, 2)}, "with img_size=\\(8, 8\\)"),
        ({"img_size": 8, "random_img_size_ratio_range": (2, 0.5)}, "smallest, largest"),
        ({"flip_prob": 1.5}, "probability, got 1.5"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_segmentation_train_transforms(**settings)
    with pytest.raises(ValueError, match="'whole' or 'slide', got 'both'"):
        make_segmentation_eval_transforms(inference_mode="both")  # type: ignore[arg-type]


def test_labels_have_one_channel_of_integers() -> None:
    with pytest.raises(ValueError, match="mode RGB"):
        label_tensor(Image.new("RGB", (2, 2)))
    with pytest.raises(ValueError, match="float32"):
        label_tensor(np.zeros((2, 2), dtype=np.float32))
    assert label_tensor(np.array([[True, False]])).tolist() == [[[1, 0]]]
