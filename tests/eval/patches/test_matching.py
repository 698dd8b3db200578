"""Patches matched between two images."""

import pytest
import torch

from dinov3.eval.patches.matching import dense_match, sparse_match

GENERATOR = torch.Generator().manual_seed(0)
LEFT = torch.randn(6, 8, 16, generator=GENERATOR)


def test_a_shifted_copy_matches_itself() -> None:
    right = LEFT.roll(shifts=(1, 2), dims=(0, 1))
    index, similarity = dense_match(LEFT, right)
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    assert torch.equal(index, (rows + 1) % 6 * 8 + (columns + 2) % 8)
    torch.testing.assert_close(similarity, torch.ones(6, 8))

    points, scores = sparse_match(LEFT, right, max_matches=100, patch_size=10, scale_b=(2.0, 1.0))
    assert len(points) == 48
    assert (scores.diff() <= 0).all()
    left, moved = points[:, 0], points[:, 1]
    torch.testing.assert_close(moved[:, 0], ((left[:, 0] + 20) % 80) * 2)
    torch.testing.assert_close(moved[:, 1], (left[:, 1] + 10) % 60)


def test_only_foreground_is_matched() -> None:
    mask_a = torch.zeros(6, 8, dtype=torch.bool)
    mask_a[2, 3] = True
    mask_b = torch.ones(6, 8, dtype=torch.bool)
    mask_b[2, 3] = False  # the patch itself is not to be had
    index, similarity = dense_match(LEFT, LEFT, mask_a, mask_b)
    assert index[2, 3] not in (-1, 2 * 8 + 3)
    assert (index == -1).sum() == 47
    assert similarity[0, 0] == 0


def test_sparse_matches_keep_their_distance() -> None:
    points, _ = sparse_match(LEFT, LEFT, max_matches=100, min_distance=20, patch_size=10)
    distances = torch.cdist(points[:, 0], points[:, 0]).fill_diagonal_(float("inf"))
    assert 1 < len(points) < 48
    assert distances.min() >= 20
    assert len(sparse_match(LEFT, LEFT, max_matches=3).points) == 3


def test_one_sided_neighbours_are_left_out() -> None:
    a = torch.tensor([[[1.0, 0.0], [0.9, 0.3]]])
    b = torch.tensor([[[1.0, 0.0]]])
    points, _ = sparse_match(a, b)
    assert points.tolist() == [[[8.0, 8.0], [8.0, 8.0]]]


def test_errors_name_what_was_given() -> None:
    with pytest.raises(ValueError, match="one width"):
        dense_match(LEFT, LEFT[..., :4])
    with pytest.raises(ValueError, match="mask_b has no foreground"):
        dense_match(LEFT, LEFT, None, torch.zeros(6, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask_a has shape \(8, 6\)"):
        dense_match(LEFT, LEFT, torch.ones(8, 6, dtype=torch.bool))
