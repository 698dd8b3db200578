"""From one image to its detections: at one size, or at several sizes and mirrored, merged by soft-NMS.

Source: Bodla et al., Soft-NMS (2017).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from dinov3.eval.detection.transforms import make_eval_transform

Detections = dict[str, Tensor]

_MIN_SCORE = 1e-3  # what soft-NMS has lowered so far is no detection
_SIGMA = 0.5


@dataclass(frozen=True)
class View:
    """An image as the detector sees it: `[3, H, W]`, and whether it is mirrored."""

    image: Tensor
    mirrored: bool


class Views:
    """From an image (PIL, or uint8 tensor `[3, H, W]`) to its views.

    Args:
        short_sides: sizes of the shorter side, one view for each [pixels].
        max_size: of the longer side [pixels], None for no limit.
        multiple: both sides are rounded up to multiples of it.
        mean, std: of images in [0, 1].
        mirror: each view also mirrored.
    """

    def __init__(
        self,
        short_sides: Sequence[int],
        max_size: int | None,
        multiple: int,
        mean: Sequence[float],
        std: Sequence[float],
        mirror: bool = False,
    ) -> None:
        self.transforms = [make_eval_transform(side, max_size, multiple, mean, std) for side in short_sides]
        self.mirror = mirror

    def __call__(self, image: Any) -> list[View]:
        views = [View(transform(image), mirrored=False) for transform in self.transforms]
        return views + [View(view.image.flip(-1), mirrored=True) for view in views] if self.mirror else views


@torch.no_grad()
def detect(
    model: nn.Module, views: Sequence[View], size: tuple[int, int], device: torch.device, topk: int | None = None
) -> Detections:
    """Detections of one image.

    Args:
        model: a `DetectorWithProcessor`.
        views: of the image.
        size: its height and width [pixels].
        device: of the model.
        topk: detections to keep when several views are merged; None: as many as one view has.

    Returns:
        `scores` `[n]`, descending, `labels` `[n]` and `boxes` `[n, 4]` (xyxy in pixels of the image), on the CPU.
    """
    found = []
    for view in views:
        one = model([view.image.to(device, non_blocking=True)], original_sizes=[size])[0]
        boxes = one["boxes"]
        if view.mirrored:
            boxes = torch.stack([size[1] - boxes[:, 2], boxes[:, 1], size[1] - boxes[:, 0], boxes[:, 3]], dim=-1)
        found.append({"scores": one["scores"].cpu(), "labels": one["labels"].cpu(), "boxes": boxes.cpu()})
    if len(found) == 1:
        return found[0]
    together = {key: torch.cat([one[key] for one in found]) for key in found[0]}
    return soft_nms(together, topk if topk is not None else max(len(one["scores"]) for one in found))


def soft_nms(detections: Detections, topk: int, sigma: float = _SIGMA) -> Detections:
    """Detections whose scores are lowered by exp(-IoU^2 / sigma) for every better one of the same class.

    Args:
        detections: `scores` `[n]`, `labels` `[n]`, `boxes` `[n, 4]`.
        topk: how many to keep.
        sigma: the larger, the less they are lowered.
    """
    scores = detections["scores"].clone()
    for label in detections["labels"].unique():
        members = (detections["labels"] == label).nonzero().flatten()
        scores[members] = _lowered(scores[members], detections["boxes"][members], sigma)
    best = scores.argsort(descending=True, stable=True)[:topk]
    best = best[scores[best] >= _MIN_SCORE]
    return {"scores": scores[best], "labels": detections["labels"][best], "boxes": detections["boxes"][best]}


def _lowered(scores: Tensor, boxes: Tensor, sigma: float) -> Tensor:
    """Scores of one class, each lowered by all that were taken before it."""
    scores, left = scores.clone(), torch.ones(len(scores), dtype=torch.bool)
    while left.any():
        best = int(torch.where(left, scores, -1.0).argmax())
        if scores[best] < _MIN_SCORE:
            break
        left[best] = False
        overlap = box_iou(boxes[best : best + 1], boxes)[0]
        scores = torch.where(left, scores * torch.exp(-(overlap**2) / sigma), scores)
    return scores
