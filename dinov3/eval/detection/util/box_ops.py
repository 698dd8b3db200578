"""Boxes: two forms, deltas between boxes, overlaps.

A box is four numbers, xyxy (left, top, right, bottom) or cxcywh (centre, width, height); all functions take `[..., 4]`
in any unit and compute in float32 at least.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

# So that deltas of very thin proposals stay finite. `bbox2delta` is hence not the exact inverse of `delta2bbox`: the
# released heads were trained with it.
_DELTA_EPS = 0.1


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """The same boxes by their corners."""
    return box_convert(boxes, "cxcywh", "xyxy")


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """The same boxes by centre and size."""
    return box_convert(boxes, "xyxy", "cxcywh")


def delta2bbox(
    proposals: Tensor,
    deltas: Tensor,
    max_shape: tuple[Tensor | float, Tensor | float] | None = None,
    wh_ratio_clip: float = 16 / 1000,
    clip_border: bool = True,
    add_ctr_clamp: bool = False,
    ctr_clamp: float = 32,
) -> Tensor:
    """Proposals moved by deltas.

    The centre moves by (w, h) times the first two deltas, width and height grow by the exponential of the others.

    Args:
        proposals: cxcywh `[..., 4]`.
        deltas: `[..., 4]`.
        max_shape: (height, width) to clip the boxes to: numbers, or tensors that broadcast with a coordinate `[...]`.
        wh_ratio_clip: sizes change by a factor between this and its inverse.
        clip_border: False does not clip to `max_shape`.
        add_ctr_clamp: centres move by `ctr_clamp` at most, and sizes may shrink by any factor.
        ctr_clamp: in the unit of the boxes.

    Returns:
        xyxy `[..., 4]`.
    """
    centre, size = _float(proposals).split(2, dim=-1)
    shift, growth = _float(deltas).split(2, dim=-1)
    shift = size * shift
    limit = abs(math.log(wh_ratio_clip))
    if add_ctr_clamp:
        shift, growth = shift.clamp(-ctr_clamp, ctr_clamp), growth.clamp(max=limit)
    else:
        growth = growth.clamp(-limit, limit)
    centre, half = centre + shift, size * growth.exp() / 2
    boxes = torch.cat([centre - half, centre + half], dim=-1)
    return boxes if max_shape is None or not clip_border else clip_boxes(boxes, *max_shape)


def clip_boxes(boxes: Tensor, height: Tensor | float, width: Tensor | float) -> Tensor:
    """xyxy boxes `[..., 4]` clipped to an image; sizes are numbers or tensors that broadcast with a coordinate."""
    height, width = (torch.as_tensor(side, dtype=boxes.dtype, device=boxes.device) for side in (height, width))
    x0, y0, x1, y1 = boxes.unbind(-1)
    sides = (width, height, width, height)
    return torch.stack([v.clamp(min=0).minimum(side) for v, side in zip((x0, y0, x1, y1), sides, strict=True)], dim=-1)


def bbox2delta(
    proposals: Tensor, gt: Tensor, means: Sequence[float] | float = 0.0, stds: Sequence[float] | float = 1.0
) -> Tensor:
    """The deltas that move each proposal to its object, normalised.

    Args:
        proposals: cxcywh `[..., 4]`.
        gt: cxcywh, of a shape that broadcasts with it.
        means, stds: of the deltas, one number or four.

    Returns:
        float32 `[..., 4]`: ((g_xy - p_xy) / (p_wh + 0.1), ln(g_wh / (p_wh + 0.1))), minus means, over stds.
    """
    proposals, gt = proposals.float(), gt.float()
    size = proposals[..., 2:] + _DELTA_EPS
    deltas = torch.cat([(gt[..., :2] - proposals[..., :2]) / size, (gt[..., 2:] / size).log()], dim=-1)
    return (deltas - deltas.new_tensor(means)) / deltas.new_tensor(stds)


def pairwise_bbox2delta(
    proposals: Tensor, gt: Tensor, means: Sequence[float] | float = 0.0, stds: Sequence[float] | float = 1.0
) -> Tensor:
    """`bbox2delta` of every pair: proposals `[N, 4]`, objects `[M, 4]`; returns `[N, M, 4]`."""
    return bbox2delta(proposals[:, None], gt[None], means, stds)


def pairwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of every pair: xyxy `[N, 4]`, `[M, 4]`; returns `[N, M]`, NaN for two boxes without extent."""
    return generalized_box_iou(_float(a), _float(b))


def paired_iou_and_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of box i of `a` with box i of `b`: xyxy `[N, 4]` each; returns `[N]`, `[N]`.

    Source: Rezatofighi et al., Generalized Intersection over Union (2019).
    """
    a, b = _float(a), _float(b)
    tiny = torch.finfo(a.dtype).tiny  # two boxes without extent have IoU 0, not NaN
    area_a, area_b = ((box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b))
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = area_a + area_b - overlap
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    iou = overlap / union.clamp(min=tiny)
    return iou, iou - (hull - union) / hull.clamp(min=tiny)


def _float(boxes: Tensor) -> Tensor:
    return boxes if boxes.dtype == torch.float64 else boxes.float()
