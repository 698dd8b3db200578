"""Losses of the detector: classes, boxes and overlaps of matched queries, on all decoder layers and both branches.

Source: Carion et al. (2020); Zhu et al., Deformable DETR (2021); hybrid matching: Jia et al. (2023); IoU-aware classes:
Cai et al., Align-DETR (2023); regression of deltas: Lin et al., DETR Does Not Need Multi-Scale or Locality Design
(2023).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from dinov3 import distributed
from dinov3.eval.detection.matcher import ALPHA, GAMMA, Costs, Match, Predictions, Target, match
from dinov3.eval.detection.util.box_ops import bbox2delta, box_cxcywh_to_xyxy, paired_iou_and_giou

CLASS_LOSSES = ("focal", "ia_bce")
_MIN_QUALITY, _QUALITY_POWER = 0.01, 0.25

ONE2MANY = "_one2many"


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses, and the kind of the class loss."""

    ce: float = 2.0
    bbox: float = 1.0
    giou: float = 2.0
    cls_loss: str = "focal"

    def __post_init__(self) -> None:
        if self.cls_loss not in CLASS_LOSSES:
            raise ValueError(f"cls_loss must be one of {', '.join(CLASS_LOSSES)}; got {self.cls_loss!r}")


@dataclass(frozen=True)
class SetCriterion:
    """The losses of a batch.

    Attributes:
        costs: of the matching.
        weights: of the losses.
        k_one2many: how often each object is a target of the one-to-many branch.
        lambda_one2many: weight of that branch.
    """

    costs: Costs = field(default_factory=Costs)
    weights: LossWeights = field(default_factory=LossWeights)
    k_one2many: int = 6
    lambda_one2many: float = 1.0

    def __call__(self, outputs: Mapping[str, Any], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Every loss by its name, not weighted but for `lambda_one2many`. A collective of the world.

        Args:
            outputs: of the detector.
            targets: `labels` `[n]` (int64) and `boxes` `[n, 4]` (cxcywh in the unit of the outputs) of each image.

        Returns:
            `loss_ce`, `loss_bbox`, `loss_giou` of the last layer; the same with `_<l>` for layers before, `_enc` for
            the proposals, and each (but proposals) with `_one2many` for the one-to-many branch.
        """
        n = mean_count(targets, outputs["pred_logits"].device)
        losses = self._branch(outputs, targets, n, "")
        if (proposals := outputs.get("enc_outputs")) is not None:
            objects = [dict(target) | {"labels": torch.zeros_like(target["labels"])} for target in targets]
            losses |= self._losses(proposals, objects, n, "_enc")
        many = {key.removesuffix(ONE2MANY): value for key, value in outputs.items() if key.endswith(ONE2MANY)}
        if many and self.k_one2many > 0 and many["pred_logits"].shape[1] > 0:
            repeated = [_repeated(target, self.k_one2many) for target in targets]
            branch = self._branch(many, repeated, n * self.k_one2many, ONE2MANY)
            losses |= {name: self.lambda_one2many * value for name, value in branch.items()}
        return losses

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum."""
        return torch.stack([value * getattr(self.weights, name.split("_")[1]) for name, value in losses.items()]).sum()

    def _branch(
        self, outputs: Mapping[str, Any], targets: Sequence[Target], n: float, suffix: str
    ) -> dict[str, Tensor]:
        losses = self._losses(outputs, targets, n, suffix)
        for level, earlier in enumerate(outputs.get("aux_outputs", ())):
            losses |= self._losses(earlier, targets, n, f"_{level}{suffix}")
        return losses

    def _losses(self, outputs: Predictions, targets: Sequence[Target], n: float, suffix: str) -> dict[str, Tensor]:
        matched = _gather(outputs, targets, match(outputs, targets, self.costs))
        if self.weights.cls_loss == "focal":
            classes = focal_loss(outputs["pred_logits"], matched)
        else:
            classes = iou_aware_loss(outputs["pred_logits"], matched)
        sums = {"ce": classes, "bbox": matched.l1.sum(), "giou": (1 - matched.giou).sum()}
        return {f"loss_{name}{suffix}": value / n for name, value in sums.items()}


@dataclass(frozen=True)
class Matched:
    """Matched pairs of a batch, M in all.

    Attributes:
        place: image, query and class of each pair, `[M]` each.
        iou, giou: of predicted box and object `[M]`.
        l1: distances of what is regressed `[M, 4]`.
    """

    place: tuple[Tensor, Tensor, Tensor]
    iou: Tensor
    giou: Tensor
    l1: Tensor


def _gather(outputs: Predictions, targets: Sequence[Target], matches: Sequence[Match]) -> Matched:
    images = torch.cat([torch.full_like(rows, i) for i, (rows, _) in enumerate(matches)])
    queries = torch.cat([rows for rows, _ in matches])
    labels = torch.cat([t["labels"][columns] for t, (_, columns) in zip(targets, matches, strict=True)])
    objects = torch.cat([t["boxes"][columns] for t, (_, columns) in zip(targets, matches, strict=True)]).float()
    boxes = outputs["pred_boxes"][images, queries].float()
    iou, giou = paired_iou_and_giou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(objects))
    if "pred_deltas" in outputs:
        # What is aimed at carries no gradient: it would fall by growing the box that the deltas are relative to.
        wanted = bbox2delta(outputs["pred_boxes_old"][images, queries].detach(), objects)
        l1 = (outputs["pred_deltas"][images, queries].float() - wanted).abs()
    else:
        l1 = (boxes - objects).abs()
    return Matched((images, queries, labels), iou, giou, l1)


def focal_loss(logits: Tensor, matched: Matched) -> Tensor:
    """Sum of the sigmoid focal loss of all queries and classes `[B, Q, K]` against the matches."""
    target = torch.zeros_like(logits, dtype=torch.float32)
    target[matched.place] = 1.0
    result: Tensor = sigmoid_focal_loss(logits.float(), target, alpha=ALPHA, gamma=GAMMA, reduction="sum")
    return result


def iou_aware_loss(logits: Tensor, matched: Matched) -> Tensor:
    """Sum of the IoU-aware cross-entropy of all queries and classes `[B, Q, K]`.

    At matches the target is t = max(p^0.25 IoU^0.75, 0.01), elsewhere 0 with weight p^2.
    """
    logits = logits.float()
    p = logits.sigmoid()
    quality = p[matched.place] ** _QUALITY_POWER * matched.iou ** (1 - _QUALITY_POWER)
    quality = quality.detach().clamp(min=_MIN_QUALITY)
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    elsewhere = -(p**GAMMA) * log_not_p
    at_match = -quality * log_p[matched.place] - (1 - quality) * log_not_p[matched.place]
    return elsewhere.sum() - elsewhere[matched.place].sum() + at_match.sum()


def mean_count(targets: Sequence[Target], device: torch.device) -> float:
    """Objects per process, at least 1: their number over all processes by that of the processes. A collective."""
    count = torch.tensor([sum(len(target["labels"]) for target in targets)], dtype=torch.float32, device=device)
    if distributed.get_world_size() > 1:
        dist.all_reduce(count)
    return max(count.item() / distributed.get_world_size(), 1.0)


def _repeated(target: Target, times: int) -> Target:
    return {"labels": target["labels"].repeat(times), "boxes": target["boxes"].repeat(times, 1)}
