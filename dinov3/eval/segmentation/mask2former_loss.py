"""Losses of Mask2Former: its queries against the segments of an image, after every decoder layer.

A segment is all pixels of one class. Masks are compared at points, not at all pixels; ignored pixels count nowhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.eval.segmentation.matcher import assign, pairwise_costs


class Matches(NamedTuple):
    """Pairs of queries and segments over a batch of images.

    Attributes:
        image, query: which prediction, int64 [N].
        classes: class of the segment, int64 [N].
    """

    image: Tensor
    query: Tensor
    classes: Tensor


class Mask2FormerLoss(nn.Module):
    """Classification, cross-entropy and dice of the masks, summed over the decoder layers.

    Args:
        num_classes: K.
        class_weight, mask_weight, dice_weight: factors of the losses, and of the costs that queries are assigned by.
        no_object_weight: weight of queries without segment in the classification.
        n_points: at which masks are compared.
        oversample_ratio: so many times more points are looked at, to find those where predictions are least certain.
        importance_sample_ratio: part of the points that are the least certain ones; the others are anywhere.
        ignore_index: label of pixels that don't count.

    Source: Cheng et al., Masked-attention Mask Transformer (2022), sections 3.2 and 3.3; points: Kirillov et al.,
    PointRend (2020), section 3.1.
    """

    class_weights: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        n_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        if n_points < 1 or oversample_ratio < 1 or not 0 <= importance_sample_ratio <= 1:
            raise ValueError(
                "need n_points >= 1, oversample_ratio >= 1 and importance_sample_ratio from 0 to 1, got "
                f"{n_points}, {oversample_ratio} and {importance_sample_ratio}"
            )
        self.num_classes = num_classes
        self.weights = {"class_weight": class_weight, "mask_weight": mask_weight, "dice_weight": dice_weight}
        self.n_points = n_points
        self.n_candidates = int(n_points * oversample_ratio)
        self.n_uncertain = int(n_points * importance_sample_ratio)
        self.ignore_index = ignore_index
        weights = torch.ones(num_classes + 1)
        weights[-1] = no_object_weight
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, outputs: Mapping[str, Any], labels: Tensor) -> dict[str, Tensor]:
        """The three losses, weighted, of a batch.

        Args:
            outputs: `pred_logits` [B, Q, K + 1], `pred_masks` [B, Q, h, w], and `aux_outputs`, a list of such pairs.
            labels: classes [B, H, W], of any size.

        Returns:
            `loss_class`, `loss_mask`, `loss_dice`.

        Note: draws points from the device's global generator; one transfer from the device; with several processes one
            all-reduce (the number of segments).
        """
        layers: list[Mapping[str, Tensor]] = [*outputs.get("aux_outputs", ()), outputs]
        classes = [self._classes(label) for label in labels]
        matches = self._match(layers, labels, classes)
        n_segments = _mean_over_processes(sum(map(len, classes)), labels.device)
        totals = {name: outputs["pred_logits"].new_zeros((), dtype=torch.float32) for name in ("class", "mask", "dice")}
        for layer, found in zip(layers, matches, strict=True):
            totals["class"] = totals["class"] + self._class_loss(layer["pred_logits"], found)
            mask, dice = self._mask_losses(layer["pred_masks"], labels, found, n_segments)
            totals["mask"], totals["dice"] = totals["mask"] + mask, totals["dice"] + dice
        return {f"loss_{name}": self.weights[f"{name}_weight"] * value for name, value in totals.items()}

    def _classes(self, label: Tensor) -> Tensor:
        """Classes of an image's segments, ascending."""
        present = label.unique()
        return present[present != self.ignore_index].long()

    @torch.no_grad()
    def _match(
        self, layers: Sequence[Mapping[str, Tensor]], labels: Tensor, classes: Sequence[Tensor]
    ) -> list[Matches]:
        """For each layer, the query of each segment; all layers look at the same points."""
        device = labels.device
        points = torch.rand(len(labels), self.n_points, 2, device=device)
        at_points = labels_at(labels, points)
        costs = []
        for layer in layers:
            sampled = values_at(layer["pred_masks"].float(), points)  # [B, Q, P]
            for i, present in enumerate(classes):
                costs.append(
                    pairwise_costs(
                        layer["pred_logits"][i],
                        sampled[i],
                        present,
                        at_points[i] == present[:, None],
                        (at_points[i] != self.ignore_index).float(),
                        **self.weights,
                    )
                )
        pairs = [(rows.to(device), columns.to(device)) for rows, columns in assign(costs)]
        found = []
        for n in range(len(layers)):
            of_layer = pairs[n * len(labels) : (n + 1) * len(labels)]
            found.append(
                Matches(
                    image=torch.cat([torch.full_like(rows, i) for i, (rows, _) in enumerate(of_layer)]),
                    query=torch.cat([rows for rows, _ in of_layer]),
                    classes=torch.cat([classes[i][columns] for i, (_, columns) in enumerate(of_layer)]),
                )
            )
        return found

    def _class_loss(self, logits: Tensor, matches: Matches) -> Tensor:
        targets = logits.new_full(logits.shape[:2], self.num_classes, dtype=torch.int64)
        targets[matches.image, matches.query] = matches.classes
        return F.cross_entropy(logits.float().transpose(1, 2), targets, self.class_weights)

    def _mask_losses(
        self, masks: Tensor, labels: Tensor, matches: Matches, n_segments: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and dice of the matched masks: means over points, sums over segments / `n_segments`."""
        chosen = masks[matches.image, matches.query].float().unsqueeze(1)  # [N, 1, h, w]
        if len(chosen) == 0:  # nothing but ignored pixels: zero, but all parameters get a gradient
            zero = masks.float().sum() * 0
            return zero, zero
        points = self._draw_points(chosen.detach())
        at_points = labels_at(labels[matches.image], points)
        targets, valid = (at_points == matches.classes[:, None]).float(), (at_points != self.ignore_index).float()
        logits = values_at(chosen, points).squeeze(1)
        entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * valid
        mask = entropy.sum(-1) / valid.sum(-1).clamp(min=1)
        probabilities = logits.sigmoid() * valid
        dice = 1 - (2 * (probabilities * targets).sum(-1) + 1) / (probabilities.sum(-1) + targets.sum(-1) + 1)
        return mask.sum() / n_segments, dice.sum() / n_segments

    @torch.no_grad()
    def _draw_points(self, masks: Tensor) -> Tensor:
        """Points [N, P, 2] for masks [N, 1, h, w]: the least certain of many random ones, and some more."""
        candidates = torch.rand(len(masks), self.n_candidates, 2, device=masks.device)
        certainty = values_at(masks, candidates).squeeze(1).abs()
        uncertain = certainty.topk(self.n_uncertain, dim=1, largest=False).indices
        n_others = self.n_points - self.n_uncertain
        others = torch.rand(len(masks), n_others, 2, device=masks.device)
        return torch.cat([candidates.gather(1, uncertain[..., None].expand(-1, -1, 2)), others], dim=1)


def values_at(maps: Tensor, points: Tensor) -> Tensor:
    """Maps [B, C, h, w] at points [B, P, 2], bilinear: [B, C, P].

    Points are (x, y) from 0 to 1 over the image; centres of pixels are at halves of their width.
    """
    grid = (2 * points - 1).unsqueeze(2)
    return F.grid_sample(maps, grid, mode="bilinear", align_corners=False).squeeze(-1)


def labels_at(labels: Tensor, points: Tensor) -> Tensor:
    """Labels [B, H, W] of the pixels that points [B, P, 2] lie in: [B, P]."""
    height, width = labels.shape[-2:]
    x = (points[..., 0] * width).long().clamp(0, width - 1)
    y = (points[..., 1] * height).long().clamp(0, height - 1)
    return labels.flatten(1).gather(1, y * width + x)


def _mean_over_processes(count: int, device: torch.device) -> Tensor:
    """Mean of a count over all processes, at least 1."""
    mean = torch.tensor(float(count), device=device)
    if distributed.get_world_size() > 1:
        dist.all_reduce(mean)
        mean /= distributed.get_world_size()
    return mean.clamp(min=1)
