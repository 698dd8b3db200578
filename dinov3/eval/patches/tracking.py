"""Masks of a first video frame carried through the video by the similarity of patch features, without training.

Every patch takes the masks of the most similar patches nearby in the first frame and in the last few ones: label
propagation as in the video segmentation of the DINOv3 paper.
"""

from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor


def make_neighborhood_mask(h: int, w: int, size: float, shape: str = "circle") -> Tensor:
    """Which patches lie within `size` patches of each other: booleans `[h, w, h, w]`.

    Args:
        h, w: of the patch grid.
        size: greatest distance, in patches.
        shape: `circle` (Euclidean distance) or `square` (the larger of the two coordinate differences).
    """
    if shape not in ("circle", "square"):
        raise ValueError(f"shape is 'circle' or 'square', got {shape!r}")
    rows = (torch.arange(h)[:, None] - torch.arange(h)).abs()[:, None, :, None]
    columns = (torch.arange(w)[:, None] - torch.arange(w)).abs()[None, :, None, :]
    if shape == "circle":
        return rows**2 + columns**2 <= size**2
    return torch.maximum(rows, columns) <= size


def propagate(
    current: Tensor, context: Tensor, context_probs: Tensor, mask: Tensor, topk: int, temperature: float
) -> Tensor:
    """Probabilities of the masks at each patch of a frame, from those of other frames.

    Works row by row of patches, on the band of context rows that the neighbourhood reaches: memory grows with the
    width of the grid, not with its area squared.

    Args:
        current: features of the frame `[h, w, D]`, of length 1.
        context: features of t frames `[t, h, w, D]`, of length 1.
        context_probs: their probabilities `[t, h, w, M]`.
        mask: `[h, w, h, w]`, true where a patch (first two) may look at another (last two), in any context frame.
        topk: how many of the most similar patches count; with ties at the last place there are more.
        temperature: similarities are divided by it before the softmax.

    Returns:
        `[h, w, M]`, summing to 1 over the masks.
    """
    h, w, _ = current.shape
    if mask.shape != (h, w, h, w) or context.shape[1:] != current.shape or context_probs.shape[:3] != context.shape[:3]:
        raise ValueError(
            f"the frame has {h} x {w} patches with {current.shape[-1]} features; got a mask {tuple(mask.shape)}, "
            f"context {tuple(context.shape)} and its probabilities {tuple(context_probs.shape)}"
        )
    mask = mask.to(current.device)
    reached = mask.any(dim=3).any(dim=1).cpu()  # [h, h]: which context rows any patch of a row may look at
    rows = []
    for row in range(h):
        band = reached[row].nonzero().flatten()
        if len(band) == 0:
            raise ValueError(f"no patch of row {row} may look at any other: the mask is empty there")
        first, last = int(band[0]), int(band[-1]) + 1
        similarity = torch.einsum("wd,tijd->wtij", current[row], context[:, first:last])
        similarity = similarity.masked_fill(~mask[row, :, None, first:last], float("-inf")).flatten(1)
        kth = similarity.topk(min(topk, similarity.shape[1]), dim=1).values[:, -1:]
        weights = similarity.masked_fill(similarity < kth, float("-inf")).div(temperature).softmax(dim=1)
        rows.append(weights @ context_probs[:, first:last].flatten(0, 2))
    probs = torch.stack(rows)
    return probs / probs.sum(dim=-1, keepdim=True)


def postprocess_probs(probs: Tensor) -> Tensor:
    """Each mask's map scaled to [0, 1] over the picture, `[..., H, W]`; a constant map becomes 0."""
    low, high = probs.amin(dim=(-2, -1), keepdim=True), probs.amax(dim=(-2, -1), keepdim=True)
    return ((probs - low) / (high - low)).nan_to_num(nan=0.0)


def mask_to_probs(mask: Tensor, h: int, w: int, n_masks: int | None = None) -> Tensor:
    """Ids `[H, W]` to one-hot probabilities `[h, w, M]` on the patch grid, by the nearest pixel.

    Args:
        mask: integers, 0 is the background.
        h, w: of the patch grid.
        n_masks: M, the background counted; default: largest id + 1.
    """
    ids = F.interpolate(mask[None, None].float(), size=(h, w), mode="nearest-exact")[0, 0].long()
    return F.one_hot(ids, num_classes=int(mask.max()) + 1 if n_masks is None else n_masks).float()


class MaskTracker:
    """Tracks the masks of a first frame through the frames that follow.

    Args:
        first_features: patch features of the first frame `[h, w, D]`, of any length.
        first_mask: its ids `[H, W]`, 0 is the background, the objects are 1, 2, ...
        max_context: how many of the last frames help besides the first one.
        size, shape: of the neighbourhood, see `make_neighborhood_mask`.
        topk, temperature: see `propagate`.
    """

    def __init__(
        self,
        first_features: Tensor,
        first_mask: Tensor,
        *,
        max_context: int = 7,
        size: float = 12,
        shape: str = "circle",
        topk: int = 5,
        temperature: float = 0.2,
    ) -> None:
        h, w, _ = first_features.shape
        self._topk, self._temperature = topk, temperature
        self._mask = make_neighborhood_mask(h, w, size, shape).to(first_features.device)
        self._first = (
            F.normalize(first_features, dim=-1),
            mask_to_probs(first_mask.to(first_features.device), h, w),
        )
        self._recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=max_context)

    def track(self, features: Tensor) -> Tensor:
        """Probabilities `[h, w, M]` of the masks in the next frame with patch features `[h, w, D]`."""
        features = F.normalize(features, dim=-1)
        context, probs = (torch.stack(parts) for parts in zip(self._first, *self._recent, strict=True))
        found = propagate(features, context, probs, self._mask, self._topk, self._temperature)
        self._recent.append((features, found))
        return found


def upsample_probs(probs: Tensor, size: tuple[int, int], *, scale: bool = True) -> Tensor:
    """Probabilities `[h, w, M]` on the patch grid to `[M, H, W]` in pixels, by the nearest patch.

    Args:
        probs: of one frame.
        size: (H, W).
        scale: stretch each map to [0, 1], see `postprocess_probs`: the published behaviour; the largest then depends
            on the extremes of the picture.
    """
    maps = F.interpolate(probs.permute(2, 0, 1)[None], size=size, mode="nearest")[0]
    return postprocess_probs(maps) if scale else maps


def predicted_mask(probs: Tensor, size: tuple[int, int], *, scale: bool = True) -> Tensor:
    """Ids uint8 `[H, W]` of the likeliest masks; see `upsample_probs`."""
    return upsample_probs(probs, size, scale=scale).argmax(dim=0).to(torch.uint8)
