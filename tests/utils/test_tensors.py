"""Ragged lists as one tensor and back."""

import torch

from dinov3.utils import cat_keep_shapes, uncat_with_shapes


def test_round_trip_keeps_values_and_leading_axes() -> None:
    tensors = [torch.randn(2, 5, 3), torch.randn(4, 3), torch.randn(1, 2, 2, 3)]
    flat, shapes, counts = cat_keep_shapes(tensors)
    assert flat.shape == (18, 3)
    assert counts == [10, 4, 4]
    for got, want in zip(uncat_with_shapes(flat, shapes, counts), tensors, strict=True):
        assert torch.equal(got, want)


def test_last_axis_comes_from_the_flat_tensor() -> None:
    flat, shapes, counts = cat_keep_shapes([torch.randn(2, 5, 3), torch.randn(4, 3)])
    parts = uncat_with_shapes(flat @ torch.randn(3, 7), shapes, counts)
    assert [tuple(part.shape) for part in parts] == [(2, 5, 7), (4, 7)]


def test_single_and_empty_tensors() -> None:
    flat, shapes, counts = cat_keep_shapes([torch.zeros(0, 5, 3)])
    assert flat.shape == (0, 3)
    assert uncat_with_shapes(flat, shapes, counts)[0].shape == (0, 5, 3)
