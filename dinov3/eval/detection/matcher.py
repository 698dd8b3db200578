"""Which query is responsible for which object: the cheapest assignment, image by image.

Source: Carion et al., End-to-End Object Detection with Transformers (2020), section 3.1; focal cost of Zhu et al.,
Deformable DETR (2021).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dinov3.eval.detection.util.box_ops import box_cxcywh_to_xyxy, pairwise_bbox2delta, pairwise_giou

ALPHA, GAMMA = 0.25, 2.0  # of focal loss and cost
_EPS = 1e-8
# In place of costs that are no numbers, as of boxes without extent: worse than any other.
_NO_MATCH = 1e8

Predictions = Mapping[str, Tensor]
Target = Mapping[str, Tensor]
Match = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Costs:
    """Weights of the parts of a match's cost."""

    classes: float = 2.0
    bbox: float = 1.0
    giou: float = 2.0


def cost_matrix(logits: Tensor, boxes: Tensor, l1: Tensor, labels: Tensor, objects: Tensor, costs: Costs) -> Tensor:
    """Cost of every query for every object of one image: `[Q, n]`.

    Args:
        logits: `[Q, classes]`.
        boxes: predicted, cxcywh `[Q, 4]`.
        l1: distances of the regressed quantities `[Q, n]`.
        labels: class of each object `[n]`.
        objects: cxcywh `[n, 4]`.
        costs: weights.
    """
    p = logits.float().sigmoid()
    positive = ALPHA * (1 - p) ** GAMMA * -(p + _EPS).log()
    negative = (1 - ALPHA) * p**GAMMA * -(1 - p + _EPS).log()
    overlap = pairwise_giou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(objects))
    return costs.classes * (positive - negative)[:, labels] + costs.bbox * l1 - costs.giou * overlap


def regression_distances(predictions: Predictions, image: int, objects: Tensor) -> Tensor:
    """L1 distance of what is regressed, for every query and object of one image `[Q, n]`.

    Of deltas if boxes are in pixels, else of boxes.
    """
    if "pred_deltas" in predictions:
        wanted = pairwise_bbox2delta(predictions["pred_boxes_old"][image], objects)
        return (predictions["pred_deltas"][image].float()[:, None] - wanted).abs().sum(-1)
    return torch.cdist(predictions["pred_boxes"][image].float(), objects.float(), p=1)


@torch.no_grad()
def match(predictions: Predictions, targets: Sequence[Target], costs: Costs) -> list[Match]:
    """The cheapest assignment of queries to objects.

    Args:
        predictions: `pred_logits` and `pred_boxes`; with boxes in pixels also `pred_deltas` and `pred_boxes_old`.
        targets: `labels` `[n]` and `boxes` `[n, 4]` (cxcywh, in the unit of the predictions) of each image.
        costs: weights.

    Returns:
        For each image queries and objects that belong together, both int64 `[min(Q, n)]`.
    """
    matches = []
    for image, target in enumerate(targets):
        labels, objects = target["labels"], target["boxes"]
        l1 = regression_distances(predictions, image, objects)
        logits, boxes = predictions["pred_logits"][image], predictions["pred_boxes"][image]
        cost = cost_matrix(logits, boxes, l1, labels, objects, costs)
        cost = cost.nan_to_num(nan=_NO_MATCH, posinf=_NO_MATCH, neginf=-_NO_MATCH)
        rows, columns = linear_sum_assignment(cost.cpu().numpy())
        matches.append((torch.as_tensor(rows, device=labels.device), torch.as_tensor(columns, device=labels.device)))
    return matches
