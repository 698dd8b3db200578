"""Which predicted mask answers for which segment of an image: the assignment of least cost."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise_costs(
    class_logits: Tensor,
    mask_logits: Tensor,
    classes: Tensor,
    masks: Tensor,
    valid: Tensor,
    *,
    class_weight: float,
    mask_weight: float,
    dice_weight: float,
) -> Tensor:
    """Cost of each pair of a query and a segment of one image, float32 [Q, M].

    Minus the probability of the segment's class, binary cross-entropy per point, and dice of the masks at the points,
    each with its weight.

    Args:
        class_logits: [Q, K + 1].
        mask_logits: of every query at P points, [Q, P].
        classes: of the segments, [M].
        masks: of the segments at the same points, 0 or 1, [M, P].
        valid: 1 at points that count, 0 at ignored ones, [P].
        class_weight, mask_weight, dice_weight: factors of the three.

    Source: Cheng et al., Masked-attention Mask Transformer (2022), sections 3.2 and 4.1; Carion et al., DETR (2020).
    """
    cost_class = -class_logits.float().softmax(-1)[:, classes]
    logits, masks = mask_logits.float(), masks.float() * valid
    n_points = valid.sum().clamp(min=1)
    inside, outside = F.softplus(-logits), F.softplus(logits) * valid  # cross-entropy where a mask is 1, and 0
    cost_mask = (inside @ masks.T + outside @ valid.expand_as(masks).sub(masks).T) / n_points
    probabilities = logits.sigmoid() * valid
    overlap = 2 * probabilities @ masks.T
    areas = probabilities.sum(-1)[:, None] + masks.sum(-1)[None]
    cost_dice = 1 - (overlap + 1) / (areas + 1)
    return class_weight * cost_class + mask_weight * cost_mask + dice_weight * cost_dice


def assign(costs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The one-to-one assignment of least total cost, for each matrix [Q, M]: rows and columns, int64 on the CPU.

    The matrices come from the device in one transfer.

    Raises:
        FloatingPointError: costs are not finite: the training has diverged.
    """
    from scipy.optimize import linear_sum_assignment

    if not costs:
        return []
    flat = torch.cat([cost.flatten() for cost in costs]).cpu()
    if not flat.isfinite().all():
        raise FloatingPointError("predictions are not finite: the training has diverged; lower optimizer.lr")
    pairs = []
    for part, cost in zip(flat.split([cost.numel() for cost in costs]), costs, strict=True):
        rows, columns = linear_sum_assignment(part.view(cost.shape).numpy())
        pairs.append((torch.from_numpy(rows), torch.from_numpy(columns)))
    return pairs
