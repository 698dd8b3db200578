"""Transforms: sizes, that boxes follow, and crops that leave nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from dinov3.eval.detection.transforms import (
    RandomAreaCrop,
    ResizeShortSide,
    keep_visible,
    make_eval_transform,
    make_train_transform,
    resized_size,
)


def _target(boxes: Any, labels: Any, size: tuple[int, int]) -> dict[str, Any]:
    return {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size, dtype=torch.float32),
        "labels": torch.tensor(labels),
        "image_id": 7,
    }


@pytest.mark.parametrize(
    ("size", "short_side", "max_size", "multiple", "want"),
    [
        ((480, 640), 800, 1333, 1, (800, 1067)),
        ((480, 640), 800, 1333, 16, (800, 1072)),
        ((200, 800), 800, 1333, 1, (333, 1333)),
        ((640, 480), 2048, None, 16, (2736, 2048)),
        ((100, 100), 33, None, 16, (48, 48)),
        ((1, 3000), 16, 64, 1, (1, 64)),
    ],
)
def test_sizes(
    size: tuple[int, int], short_side: int, max_size: int | None, multiple: int, want: tuple[int, int]
) -> None:
    assert resized_size(*size, short_side, max_size, multiple) == want


def test_boxes_follow_the_image() -> None:
    """A bright rectangle stays where its box says, through mirroring, cropping and resizing."""
    transform = make_train_transform([80, 160], None, 0.6, 0.7, 0.5, (0, 0, 0), (1, 1, 1))
    image = torch.zeros(3, 96, 128, dtype=torch.uint8)
    image[:, 24:72, 32:96] = 255
    sizes = set()
    for seed in range(12):
        torch.manual_seed(seed)
        seen, target = transform(image, _target([[32, 24, 96, 72]], [4], (96, 128)))
        sizes.add(tuple(seen.shape))
        x0, y0, x1, y1 = target["boxes"][0].tolist()
        rows, columns = (seen[0] > 0.5).nonzero(as_tuple=True)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert [float(x) for x in found] == pytest.approx([x0, y0, x1, y1], abs=1.5)
        assert 80 <= min(seen.shape[1:]) <= 160
        assert target["labels"].tolist() == [4]
        assert type(seen) is Tensor
    assert len(sizes) > 6


def test_crops_keep_their_part_of_the_area() -> None:
    crop = RandomAreaCrop(0.6, p=1.0)
    image = torch.zeros(3, 100, 200, dtype=torch.uint8)
    parts = []
    for seed in range(40):
        torch.manual_seed(seed)
        parts.append(crop(tv_tensors.Image(image))[0].numel() / 20000)
    assert 0.58 < min(parts) < 0.68
    assert max(parts) > 0.9
    assert torch.equal(RandomAreaCrop(0.6, p=0.0)(tv_tensors.Image(image)), image)


def test_objects_of_which_nothing_is_left_are_none() -> None:
    target = _target([[-5, -5, 8, 8], [20, 0, 30, 9], [3, 3, 4, 4], [5, 5, 7, 6]], [1, 2, 3, 4], (10, 10))
    kept = keep_visible(target)
    assert kept["boxes"].tolist() == [[0, 0, 8, 8], [5, 5, 7, 6]]
    assert kept["labels"].tolist() == [1, 4]
    assert kept["image_id"] == 7
    assert isinstance(kept["boxes"], tv_tensors.BoundingBoxes)
    nothing = keep_visible(_target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64).tolist(), (10, 10)))
    assert nothing["boxes"].shape == (0, 4)


def test_the_same_seed_draws_the_same() -> None:
    transform = make_train_transform([40, 80])
    image, target = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8), _target([[1, 2, 50, 40]], [1], (60, 90))
    torch.manual_seed(3)
    first = transform(image, target)
    torch.manual_seed(3)
    again = transform(image, target)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1]["boxes"], again[1]["boxes"])


def test_evaluation_sees_the_whole_image_at_multiples_of_the_patch() -> None:
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    assert make_eval_transform(100, 120, 16)(image).shape == (3, 96, 128)


def test_sizes_that_make_no_sense_are_refused() -> None:
    for arguments in ((0,), ([80, 40],), (16, None, 0)):
        with pytest.raises(ValueError, match="short_side must be a size or a range of sizes"):
            ResizeShortSide(*arguments)
    with pytest.raises(ValueError, match=r"min_area must lie in \(0, 1\]"):
        RandomAreaCrop(0.0)
