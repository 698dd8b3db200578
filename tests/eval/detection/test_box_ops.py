"""Boxes: forms, deltas, overlaps, and boxes without extent."""

import math

import pytest
import torch
from torch import Tensor

from dinov3.eval.detection.util.box_ops import (
    bbox2delta,
    box_cxcywh_to_xyxy,
    box_xyxy_to_cxcywh,
    delta2bbox,
    paired_iou_and_giou,
    pairwise_bbox2delta,
    pairwise_giou,
)
from dinov3.eval.detection.util.misc import (
    NestedTensor,
    inverse_sigmoid,
    nested_tensor_from_tensor_list,
    pad_to_multiple,
    resize_mask,
)


def _boxes(n: int) -> Tensor:
    return torch.cat([torch.rand(n, 2) * 100, torch.rand(n, 2) * 40 + 4], dim=1)


def test_no_delta_leaves_a_box_as_it_is_and_clipping_changes_no_input() -> None:
    boxes, deltas = _boxes(6), torch.zeros(6, 4)
    torch.testing.assert_close(delta2bbox(boxes, deltas), box_cxcywh_to_xyxy(boxes))
    before = boxes.clone()
    clipped = delta2bbox(boxes, deltas, (30.0, 50.0))
    assert torch.equal(boxes, before)
    assert clipped[:, 0::2].max() <= 50
    assert clipped[:, 1::2].max() <= 30
    assert clipped.min() >= 0


def test_deltas_are_inverse_up_to_the_tenth_of_a_pixel_that_heads_were_trained_with() -> None:
    proposals, objects = _boxes(50), _boxes(50)
    moved = box_xyxy_to_cxcywh(delta2bbox(proposals, bbox2delta(proposals, objects)))
    factor = proposals[:, 2:] / (proposals[:, 2:] + 0.1)
    torch.testing.assert_close(moved[:, 2:], objects[:, 2:] * factor)
    torch.testing.assert_close(moved[:, :2], proposals[:, :2] + (objects - proposals)[:, :2] * factor)


def test_sets_of_equal_size_are_compared_in_pairs_only_where_asked_for() -> None:
    a, b = _boxes(5), _boxes(5)
    every = pairwise_bbox2delta(a, b)
    assert every.shape == (5, 5, 4)
    torch.testing.assert_close(every.diagonal().T, bbox2delta(a, b))


def test_sizes_change_by_a_bounded_factor() -> None:
    box, huge = torch.tensor([[50.0, 50.0, 10.0, 10.0]]), torch.full((1, 4), 100.0)
    moved = box_xyxy_to_cxcywh(delta2bbox(box, huge))
    torch.testing.assert_close(moved[0, 2:], torch.full((2,), 10 / 0.016))
    clamped = box_xyxy_to_cxcywh(delta2bbox(box, -huge, add_ctr_clamp=True, ctr_clamp=7))
    torch.testing.assert_close(clamped[0], torch.tensor([43.0, 43.0, 0.0, 0.0]))


def test_overlap_of_pairs_is_the_diagonal_of_that_of_all() -> None:
    a, b = box_cxcywh_to_xyxy(_boxes(20)), box_cxcywh_to_xyxy(_boxes(20))
    iou, giou = paired_iou_and_giou(a, b)
    torch.testing.assert_close(giou, pairwise_giou(a, b).diagonal())
    assert bool((giou <= iou).all())
    assert bool((giou > -1).all())
    same, _ = paired_iou_and_giou(a, a)
    torch.testing.assert_close(same, torch.ones(20))


def test_boxes_without_extent_have_finite_overlaps_and_gradients() -> None:
    a = torch.tensor([[5.0, 5.0, 5.0, 5.0], [1.0, 1.0, 3.0, 3.0]], requires_grad=True)
    iou, giou = paired_iou_and_giou(a, torch.tensor([[5.0, 5.0, 5.0, 5.0], [4.0, 4.0, 4.0, 6.0]]))
    assert iou.tolist() == [0, 0]
    giou.sum().backward()
    assert a.grad is not None
    assert bool(a.grad.isfinite().all())


def test_inverse_sigmoid_is_finite_everywhere() -> None:
    x = torch.tensor([-1.0, 0.0, 0.25, 1.0, 2.0])
    limit = math.log(1e5)
    torch.testing.assert_close(inverse_sigmoid(x), torch.tensor([-limit, -limit, -math.log(3), limit, limit]))


def test_batches_of_several_sizes() -> None:
    images = [torch.ones(3, 5, 7), torch.ones(3, 6, 4)]
    batch = nested_tensor_from_tensor_list(images, size_divisor=8)
    assert batch.tensors.shape == (2, 3, 8, 8)
    assert batch.tensors.sum() == 3 * (5 * 7 + 6 * 4)
    assert (~batch.mask).sum((1, 2)).tolist() == [35, 24]
    plain = nested_tensor_from_tensor_list(images)
    assert plain.tensors.shape == (2, 3, 6, 7)
    padded = pad_to_multiple(plain, 8)
    assert all(torch.equal(a, b) for a, b in zip(padded, batch, strict=True))
    assert pad_to_multiple(batch, 8) is batch
    assert isinstance(padded, NestedTensor)


def test_images_that_make_no_batch_are_refused() -> None:
    for images in ([torch.ones(5, 7)], [torch.ones(3, 0, 7)], [torch.ones(3, 4, 4), torch.ones(1, 4, 4)]):
        with pytest.raises(ValueError, match=r"expected images \[channels, height, width\]"):
            nested_tensor_from_tensor_list(images)
    with pytest.raises(ValueError, match="at least one image"):
        nested_tensor_from_tensor_list([])


def test_masks_are_resized_by_their_top_left_pixels() -> None:
    mask = torch.arange(7)[None, None].expand(1, 7, 7) >= 3
    assert resize_mask(mask, (1, 3))[0, 0].tolist() == [False, False, True]  # columns 0, 2, 4
    assert resize_mask(mask, (14, 14))[0, 0].tolist() == [False] * 6 + [True] * 8
