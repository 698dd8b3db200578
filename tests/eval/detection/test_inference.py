"""Single images: sizes, mirrored views, soft-NMS."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.eval.detection.inference import Views, detect, soft_nms
from dinov3.eval.detection.transforms import IMAGENET_MEAN, IMAGENET_STD

CPU = torch.device("cpu")


class BrightBox(nn.Module):
    """Detects the bright part of an image, in pixels of the original."""

    def forward(self, images: list[Tensor], *, original_sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        (image,) = images
        rows, columns = (image[0] > 0).nonzero(as_tuple=True)
        height, width = image.shape[-2:]
        y, x = original_sizes[0][0] / height, original_sizes[0][1] / width
        box = [columns.min() * x, rows.min() * y, (columns.max() + 1) * x, (rows.max() + 1) * y]
        return [{"scores": torch.tensor([0.8]), "labels": torch.tensor([3]), "boxes": torch.tensor([box])}]


def _image() -> Tensor:
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    image[:, 16:48, 8:32] = 255
    return image


def _views(*sides: int, mirror: bool = False) -> Views:
    return Views(sides, None, 16, IMAGENET_MEAN, IMAGENET_STD, mirror=mirror)


def test_boxes_are_those_of_the_image_whatever_the_view() -> None:
    views = _views(64, 128, mirror=True)(_image())
    assert [tuple(view.image.shape[1:]) for view in views] == [(64, 96), (128, 192)] * 2
    assert [view.mirrored for view in views] == [False, False, True, True]
    for view in views:
        found = detect(BrightBox(), [view], (64, 96), CPU)
        torch.testing.assert_close(found["boxes"], torch.tensor([[8.0, 16.0, 32.0, 48.0]]))


def test_views_are_merged() -> None:
    found = detect(BrightBox(), _views(64, 128, mirror=True)(_image()), (64, 96), CPU, topk=10)
    assert found["scores"][0] == pytest.approx(0.8)
    assert found["scores"][1] == pytest.approx(0.8 * math.exp(-2))  # the same box again
    assert found["labels"].tolist() == [3] * len(found["labels"])


def test_soft_nms_lowers_overlapping_detections_of_a_class() -> None:
    detections = {
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.6]),
        "labels": torch.tensor([1, 1, 2, 1]),
        "boxes": torch.tensor([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 10], [50, 50, 60, 60]], dtype=torch.float32),
    }
    found = soft_nms(detections, topk=3)
    assert found["scores"].tolist() == pytest.approx([0.9, 0.7, 0.6])
    everything = soft_nms(detections, topk=10)
    assert everything["scores"].tolist() == pytest.approx([0.9, 0.7, 0.6, 0.8 * math.exp(-0.25 / 0.5)])
    assert torch.equal(everything["boxes"][1], detections["boxes"][2])
    empty: dict[str, Any] = {key: value[:0] for key, value in detections.items()}
    assert soft_nms(empty, topk=3)["scores"].shape == (0,)
