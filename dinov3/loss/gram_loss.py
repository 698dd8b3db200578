"""Gram anchoring: keeps the similarities between patches of the student close to those of an earlier teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GramLoss(nn.Module):
    """Mean squared difference of the Gram matrices of two sets of patch features.

    Args:
        apply_norm: L2-normalise features first, so that the matrices hold cosine similarities.
        img_level: accepted for old callers, without effect; the argument of `forward` counts.
        remove_neg: set negative similarities of both sets to 0.
        remove_only_teacher_neg: set negative similarities of the target to 0; the student's stay.

    Raises:
        ValueError: both kinds of removal are asked for.

    Source: Siméoni et al., "DINOv3", section 4.2.
    """

    def __init__(
        self,
        apply_norm: bool = True,
        img_level: bool = True,
        remove_neg: bool = True,
        remove_only_teacher_neg: bool = False,
    ) -> None:
        super().__init__()
        if remove_neg and remove_only_teacher_neg:
            raise ValueError("remove_neg and remove_only_teacher_neg exclude each other: set at most one of them")
        self.apply_norm = apply_norm
        self.remove_neg = remove_neg
        self.remove_only_teacher_neg = remove_only_teacher_neg

    def forward(self, output_feats: Tensor, target_feats: Tensor, img_level: bool = True) -> Tensor:
        """Loss of student features against target features.

        Args:
            output_feats: [B, P, D], or [n, D] if not `img_level`.
            target_feats: the same patches, [B, P, D'] or [n, D']; D' may differ from D.
            img_level: compare patches within each image; otherwise all patches of the batch form one set.

        Returns:
            Scalar in float32.

        Raises:
            ValueError: shapes don't fit.
        """
        if output_feats.shape[:-1] != target_feats.shape[:-1]:
            raise ValueError(
                "student and target must have the same patches, got features of shape "
                f"{tuple(output_feats.shape)} and {tuple(target_feats.shape)}"
            )
        if output_feats.ndim != 3 and (img_level or output_feats.ndim != 2):
            wanted = "[B, P, D] (or img_level=False for [n, D])" if img_level else "[B, P, D] or [n, D]"
            raise ValueError(f"expected features of shape {wanted}, got {tuple(output_feats.shape)}")
        with torch.autocast(output_feats.device.type, enabled=False):
            student = self._similarities(output_feats, img_level)
            target = self._similarities(target_feats, img_level)
            if self.remove_neg:
                student = student.clamp(min=0.0)
            if self.remove_neg or self.remove_only_teacher_neg:
                target = target.clamp(min=0.0)
            return F.mse_loss(student, target)

    def _similarities(self, feats: Tensor, img_level: bool) -> Tensor:
        """[B, P, P], or [n, n] if not `img_level`."""
        feats = feats.to(torch.promote_types(feats.dtype, torch.float32))
        if self.apply_norm:
            feats = F.normalize(feats, dim=-1)
        if not img_level and feats.ndim == 3:
            feats = feats.flatten(0, 1)
        return feats @ feats.mT
