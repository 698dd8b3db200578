"""Patches of two images matched by the similarity of their features: for every patch, or only where both agree."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DenseMatches(NamedTuple):
    """For each patch of the left image the most similar one of the right image.

    Attributes:
        partner: int64 `[h, w]`, row * w_right + column of the right patch; -1 outside the left foreground.
        similarity: cosine `[h, w]`; 0 outside.
    """

    partner: Tensor
    similarity: Tensor


class SparseMatches(NamedTuple):
    """Pairs of patches that are each other's most similar one, best first.

    Attributes:
        points: float `[k, 2, 2]`: per match the (x, y) centre of the left patch and of the right one, in pixels.
        similarity: cosine `[k]`.
    """

    points: Tensor
    similarity: Tensor


def dense_match(
    feats_a: Tensor, feats_b: Tensor, mask_a: Tensor | None = None, mask_b: Tensor | None = None
) -> DenseMatches:
    """Match every foreground patch of image a with a foreground patch of image b.

    Args:
        feats_a, feats_b: patch features `[h, w, D]` of any length, sizes may differ.
        mask_a, mask_b: booleans `[h, w]`, true in the foreground; default: everything.

    Raises:
        ValueError: a foreground without a patch, or features of different width.
    """
    similarity = _similarities(feats_a, feats_b, mask_a, mask_b)
    best, index = similarity.max(dim=1)
    h, w = feats_a.shape[:2]
    outside = _foreground(feats_a, mask_a, "mask_a").logical_not()
    return DenseMatches(index.masked_fill(outside, -1).view(h, w), best.masked_fill(outside, 0).view(h, w))


def sparse_match(
    feats_a: Tensor,
    feats_b: Tensor,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    *,
    max_matches: int = 20,
    min_distance: float = 0.0,
    patch_size: int = 16,
    scale_a: tuple[float, float] = (1.0, 1.0),
    scale_b: tuple[float, float] = (1.0, 1.0),
) -> SparseMatches:
    """Mutual nearest neighbours, the most similar first, thinned out.

    Args:
        feats_a, feats_b, mask_a, mask_b: see `dense_match`.
        max_matches: the most that are returned.
        min_distance: smallest distance, in pixels of the original pictures, between two matches in either of them.
        patch_size: in pixels of the resized pictures.
        scale_a, scale_b: (x, y) size of the original pictures over that of the resized ones.
    """
    similarity = _similarities(feats_a, feats_b, mask_a, mask_b)
    to_b, to_a = similarity.argmax(dim=1), similarity.argmax(dim=0)
    a = torch.arange(len(to_b), device=similarity.device)
    a = a[_foreground(feats_a, mask_a, "mask_a") & (to_a[to_b] == a)]
    scores = similarity[a, to_b[a]]
    order = scores.argsort(descending=True, stable=True)
    a, scores = a[order], scores[order]
    points = torch.stack(
        [
            _centres(a, feats_a.shape[1], patch_size, scale_a),
            _centres(to_b[a], feats_b.shape[1], patch_size, scale_b),
        ],
        dim=1,
    )
    chosen = _spread(points, max_matches, min_distance)
    return SparseMatches(points[chosen], scores[chosen])


def _similarities(feats_a: Tensor, feats_b: Tensor, mask_a: Tensor | None, mask_b: Tensor | None) -> Tensor:
    """Cosines `[P_a, P_b]`; -inf where either patch is background."""
    if feats_a.ndim != 3 or feats_b.ndim != 3 or feats_a.shape[-1] != feats_b.shape[-1]:
        raise ValueError(
            f"expected features [h, w, D] of one width, got {tuple(feats_a.shape)} and {tuple(feats_b.shape)}"
        )
    a, b = (F.normalize(feats.flatten(0, 1), dim=-1) for feats in (feats_a, feats_b))
    inside = (
        _foreground(feats_a, mask_a, "mask_a")[:, None] & _foreground(feats_b, mask_b, "mask_b").to(a.device)[None, :]
    )
    return (a @ b.T).masked_fill(~inside, float("-inf"))


def _foreground(feats: Tensor, mask: Tensor | None, name: str) -> Tensor:
    if mask is None:
        return torch.ones(feats.shape[:2], dtype=torch.bool, device=feats.device).flatten()
    if mask.shape != feats.shape[:2]:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, the patch grid is {tuple(feats.shape[:2])}")
    if not mask.any():
        raise ValueError(f"{name} has no foreground patch")
    return mask.to(feats.device).flatten()


def _centres(index: Tensor, columns: int, patch_size: int, scale: tuple[float, float]) -> Tensor:
    x, y = index % columns, index.div(columns, rounding_mode="floor")
    return (torch.stack([x, y], dim=1) + 0.5) * patch_size * torch.tensor(scale, device=index.device)


def _spread(points: Tensor, max_matches: int, min_distance: float) -> list[int]:
    """Greedy choice of matches that keep their distance in both pictures."""
    chosen: list[int] = []
    for index in range(len(points)):
        if len(chosen) == max_matches:
            break
        distances = (points[chosen] - points[index]).norm(dim=-1)  # [chosen, 2]
        if not bool((distances < min_distance).any()):
            chosen.append(index)
    return chosen
