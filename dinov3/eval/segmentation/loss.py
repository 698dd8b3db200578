"""Losses of the linear head: cross-entropy and dice over pixels, with the averages of the published training.

The losses of Mask2Former compare sets of masks and live elsewhere.
"""

import logging
import os
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger("dinov3")

Reduction = Literal["none", "mean", "sum"]

# Keeps a division by a count of 0 finite, as in the published training.
_EPS = torch.finfo(torch.float32).eps


class CrossEntropyLoss(nn.Module):
    """Cross-entropy of each pixel, averaged over ALL pixels: ignored ones count as 0 and still in the number.

    Args:
        weight: factor of each pixel, broadcast to `[B, H, W]`.
        class_weight: factor of each class; the average does not divide by their sum, unlike torch's.
        loss_weight: factor of the result.
        reduction: `mean`, `sum` or `none`.
        avg_factor: if given, `avg_non_ignore` is off. Its value has no effect.
        ignore_index: label of ignored pixels.
        avg_non_ignore: average over the pixels that are not ignored.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        class_weight: Sequence[float] | Tensor | None = None,
        loss_weight: float = 1.0,
        reduction: Reduction = "mean",
        avg_factor: float | None = None,
        ignore_index: int = 255,
        avg_non_ignore: bool = False,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.class_weight = class_weight
        self.loss_weight = loss_weight
        self.reduction = _checked(reduction)
        self.ignore_index = ignore_index
        self.avg_non_ignore = avg_non_ignore and avg_factor is None

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """Loss of logits `[B, K, H, W]` for labels `[B, H, W]`: one number, or `[B, H, W]` if not reduced."""
        label = label.long()
        class_weight = None
        if self.class_weight is not None:
            class_weight = torch.as_tensor(self.class_weight, dtype=pred.dtype, device=pred.device)
        loss = F.cross_entropy(pred, label, class_weight, reduction="none", ignore_index=self.ignore_index)
        if self.weight is not None:
            loss = loss * self.weight.to(loss)
        if self.reduction == "mean" and self.avg_non_ignore:
            loss = loss.sum() / ((label != self.ignore_index).sum() + _EPS)
        elif self.reduction != "none":
            loss = loss.mean() if self.reduction == "mean" else loss.sum()
        return self.loss_weight * loss


class DiceLoss(nn.Module):
    """Overlap of softmax probabilities p and one-hot labels t, class by class.

    With v = 0 at ignored pixels, for each class and sample: 1 - (2 sum(p t v) + smooth) / (sum(p^e + t^e) + smooth);
    averaged over samples and classes.

    Args:
        smooth: keeps absent classes finite.
        exponent: e.
        reduction: accepted for its place in configurations: the loss is one number, so all are the same.
        class_weight: factor of each class; numbers, or the path of a `.npy` file.
        loss_weight: factor of the result.
        ignore_index: label of ignored pixels; a class of this index is left out (the average still divides by all).

    Source: Milletari et al., V-Net (2016), section 3.
    """

    def __init__(
        self,
        smooth: float = 1,
        exponent: float = 2,
        reduction: Reduction = "mean",
        class_weight: Sequence[float] | str | os.PathLike[str] | None = None,
        loss_weight: float = 1.0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.smooth = smooth
        self.exponent = exponent
        self.reduction = _checked(reduction)
        self.class_weight = _read_weights(class_weight) if isinstance(class_weight, str | os.PathLike) else class_weight
        self.loss_weight = loss_weight
        self.ignore_index = ignore_index

    def forward(self, pred: Tensor, label: Tensor, avg_factor: float | None = None) -> Tensor:
        """Loss, one number, of logits `[B, K, H, W]`.

        Args:
            pred: logits.
            label: `[B, H, W]`.
            avg_factor: the result is divided by it.
        """
        n_classes = pred.shape[1]
        label = label.long()
        target = F.one_hot(label.clamp(0, n_classes - 1), n_classes).movedim(-1, 1).to(pred.dtype)
        valid = (label != self.ignore_index).unsqueeze(1)
        return self._dice(pred.softmax(dim=1), target, valid, avg_factor)

    def _dice(self, probs: Tensor, target: Tensor, valid: Tensor | None, avg_factor: float | None) -> Tensor:
        hit = probs * target if valid is None else probs * target * valid
        area = probs**self.exponent + target**self.exponent
        ratio = (2 * hit.flatten(2).sum(-1) + self.smooth) / (area.flatten(2).sum(-1) + self.smooth)  # [B, K]
        losses = (1 - ratio).mean(dim=0)
        n_classes = len(losses)
        if self.class_weight is not None:
            losses = losses * torch.as_tensor(self.class_weight, dtype=losses.dtype, device=losses.device)
        if 0 <= self.ignore_index < n_classes:
            losses = losses[torch.arange(n_classes, device=losses.device) != self.ignore_index]
        loss = losses.sum() / n_classes
        if avg_factor is not None:
            loss = loss / (avg_factor + _EPS)
        return self.loss_weight * loss


class MultilabelDiceLoss(DiceLoss):
    """`DiceLoss` with a sigmoid for each class, for pixels of several classes."""

    def forward(self, pred: Tensor, label: Tensor, avg_factor: float | None = None) -> Tensor:
        """Loss, one number, of logits `[B, K, H, W]` for labels of the same shape, 0 or 1."""
        if pred.shape != label.shape:
            raise ValueError(f"expected labels of the logits' shape {tuple(pred.shape)}, got {tuple(label.shape)}")
        return self._dice(pred.sigmoid(), label.to(pred.dtype), None, avg_factor)


class MultiSegmentationLoss(nn.Module):
    """The loss that a configuration asks for: multilabel dice if its weight is positive, else cross-entropy.

    Args:
        diceloss_weight: factor of the dice loss, which replaces cross-entropy when positive.
        celoss_weight: factor of the cross-entropy.
        ignore_index: label of ignored pixels.

    Raises:
        ValueError: negative weights, or none that is positive.
    """

    def __init__(self, diceloss_weight: float = 0.0, celoss_weight: float = 1.0, ignore_index: int = 255) -> None:
        super().__init__()
        if min(diceloss_weight, celoss_weight) < 0 or max(diceloss_weight, celoss_weight) == 0:
            raise ValueError(
                "expected one positive weight of the losses and none that is negative, got "
                f"diceloss_weight={diceloss_weight}, celoss_weight={celoss_weight}"
            )
        self.ignore_index = ignore_index
        self.loss: nn.Module
        if diceloss_weight > 0:
            if celoss_weight > 0:
                logger.warning("diceloss_weight > 0: the dice loss replaces cross-entropy, celoss_weight is ignored")
            self.loss = MultilabelDiceLoss(loss_weight=diceloss_weight, ignore_index=ignore_index)
        else:
            self.loss = CrossEntropyLoss(loss_weight=celoss_weight, ignore_index=ignore_index)

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """Loss, one number, of logits `[B, K, H, W]`.

        Args:
            pred: logits.
            label: classes `[B, H, W]`; for the dice loss also 0 or 1, `[B, K, H, W]`.
        """
        if isinstance(self.loss, MultilabelDiceLoss) and label.ndim == 3:
            classes = torch.arange(pred.shape[1], device=label.device).view(1, -1, 1, 1)
            label = label.unsqueeze(1) == classes  # nothing is 1 at ignored pixels
        return self.loss(pred, label)


def _checked(reduction: Reduction) -> Reduction:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction is 'none', 'mean' or 'sum', got {reduction!r}")
    return reduction


def _read_weights(path: str | os.PathLike[str]) -> list[float]:
    import numpy as np

    weights: list[float] = np.load(path, allow_pickle=False).tolist()
    return weights
