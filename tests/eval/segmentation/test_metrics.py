"""Areas and metrics: definitions on small images, exact counts, classes that do not occur."""

import math

import pytest
import torch

from dinov3.eval.segmentation.metrics import (
    calculate_class_metrics,
    calculate_intersect_and_union,
    calculate_segmentation_metrics,
    preprocess_nonzero_labels,
)


def test_areas_are_what_their_names_say() -> None:
    generator = torch.Generator().manual_seed(0)
    pred = torch.randint(0, 5, (9, 7), generator=generator)
    label = torch.randint(0, 7, (1, 9, 7), generator=generator)
    label[label == 6] = 255
    areas = calculate_intersect_and_union(pred[None], label, 5)
    assert areas.dtype == torch.int64
    counted = label[0] != 255
    for k in range(5):  # labels of 5 are beyond the classes
        p, t = (pred == k) & counted, (label[0] == k) & counted
        assert areas[:, k].tolist() == [int((p & t).sum()), int((p | t).sum()), int(p.sum()), int(t.sum())]


def test_counts_beyond_the_precision_of_float32_are_exact() -> None:
    large = torch.tensor([[2**24 + 1], [2**24 + 1], [2**24 + 1], [2**24 + 1]])
    one_wrong = torch.tensor([[0], [1], [0], [1]])
    metrics = calculate_segmentation_metrics([large, one_wrong])
    assert metrics["mIoU"] == (2**24 + 1) / (2**24 + 2)


def test_an_image_without_a_counted_pixel_adds_nothing() -> None:
    areas = calculate_intersect_and_union(torch.zeros(4, 4).long(), torch.full((4, 4), 255), 3)
    assert not areas.any()
    assert all(math.isnan(value) for value in calculate_segmentation_metrics([areas]).values())


def test_images_add_up() -> None:
    generator = torch.Generator().manual_seed(1)
    pred, label = (torch.randint(0, 4, (2, 6, 5), generator=generator) for _ in range(2))
    single = [calculate_intersect_and_union(pred[i], label[i], 4) for i in range(2)]
    whole = calculate_intersect_and_union(pred, label, 4)
    names = ("mIoU", "dice", "fscore")
    assert calculate_segmentation_metrics(single, names) == calculate_segmentation_metrics([whole], names)


def test_classes_that_do_not_occur() -> None:
    """Never predicted: 0 for dice, left out of the F-score. Nowhere at all: left out of everything."""
    areas = calculate_intersect_and_union(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]), 3)
    classes = calculate_class_metrics(areas)
    assert classes["dice"][1] == 0
    assert classes["fscore"][1].isnan()
    assert all(values[2].isnan() for values in classes.values())
    metrics = calculate_segmentation_metrics([areas], ("mIoU", "dice", "fscore"))
    assert list(metrics) == ["mIoU", "acc", "aAcc", "dice", "fscore", "precision", "recall"]
    assert metrics["mIoU"] == pytest.approx(0.75 / 2)
    assert metrics["aAcc"] == pytest.approx(0.75)
    assert metrics["dice"] == pytest.approx((6 / 7) / 2)
    assert metrics["fscore"] == pytest.approx(6 / 7)


def test_only_what_is_asked_for() -> None:
    areas = calculate_intersect_and_union(torch.tensor([0, 1]), torch.tensor([0, 1]), 2)
    assert calculate_segmentation_metrics([areas], ("dice",)) == {"dice": 1.0}
    with pytest.raises(ValueError, match=r"unknown metrics \['IoU'\]; known: mIoU, dice, fscore"):
        calculate_segmentation_metrics([areas], ("IoU",))
    with pytest.raises(ValueError, match="at least one image"):
        calculate_segmentation_metrics([])
    with pytest.raises(ValueError, match=r"a prediction of shape \(2,\) for labels of shape \(3,\)"):
        calculate_intersect_and_union(torch.zeros(2), torch.zeros(3), 2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_that_count_from_one(dtype: torch.dtype) -> None:
    label = torch.tensor([0, 1, 150, 254, 255], dtype=dtype)
    reduced = preprocess_nonzero_labels(label)
    assert reduced.tolist() == [255, 0, 149, 253, 255]
    assert reduced.dtype == dtype
    assert label.tolist() == [0, 1, 150, 254, 255]
