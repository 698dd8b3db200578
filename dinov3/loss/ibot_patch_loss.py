"""iBOT: cross-entropy between prototype assignments of the masked patches of the student and those of the teacher."""

import torch.distributed as dist
from torch import Tensor, nn

from dinov3.loss.centering import CenteredLoss
from dinov3.loss.cross_entropy import soft_cross_entropy
from dinov3.loss.sinkhorn_knopp import sinkhorn_knopp


class SinkhornKnoppTeacher(nn.Module):
    """`sinkhorn_knopp` over the masked patches of the subgroup, as a module without state."""

    def forward(
        self,
        teacher_output: Tensor,
        teacher_temp: float,
        n_masked_patches_tensor: Tensor | None = None,
        n_iterations: int = 3,
        group: dist.ProcessGroup | None = None,
        *,
        inplace: bool = False,
    ) -> Tensor:
        """Targets [M, K] from teacher logits [M, K], whose place they take if `inplace`; see `sinkhorn_knopp`.

        `n_masked_patches_tensor`, the number of patches of this rank, is accepted and left alone: the number of
        samples is a common factor that the last normalisation removes.
        """
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations=n_iterations, group=group, inplace=inplace)


class iBOTPatchLoss(CenteredLoss):
    """Mean over images of the mean cross-entropy of their masked patches.

    Args:
        patch_out_dim: number of prototypes K.
        student_temp: temperature of the student's logits.
        center_momentum: of the centring alternative, see `CenteredLoss`; its batch mean is over images and patches.

    Source: Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer", equation 2.
    """

    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, 1, patch_out_dim), center_momentum)
        self.student_temp = student_temp
        self.sinkhorn_knopp_teacher = SinkhornKnoppTeacher()

    def forward(self, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor) -> Tensor:
        """Loss of whole images.

        Args:
            student_patch_tokens: logits of all patches [B, N, K].
            teacher_patch_tokens: probabilities of all patches [B, N, K], constants.
            student_masks_flat: [B, N], true at the patches that count.

        Returns:
            Scalar in float32. Images without masked patch add nothing, but count in the mean.
        """
        losses = soft_cross_entropy(student_patch_tokens, list(teacher_patch_tokens), self.student_temp)  # [B, N]
        masks = student_masks_flat.to(losses.dtype)
        return ((losses * masks).sum(dim=-1) / masks.sum(dim=-1).clamp(min=1.0)).mean()

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """Loss of patches that were selected beforehand, in the order of the flattened masks.

        Args:
            student_patch_tokens_masked: logits [M, K].
            teacher_patch_tokens_masked: probabilities [M, K], constants.
            student_masks_flat: masks of all crops [rows, P], bool.
            n_masked_patches: use only the first so many patches; None: all.
            masks_weight: weight of each patch [M]; None: 1 / (masked patches of its crop).

        Returns:
            Scalar in float32: weighted sum / rows. Crops without mask count among the rows.
        """
        if masks_weight is None:
            per_row = 1 / student_masks_flat.sum(dim=-1).clamp(min=1.0)
            masks_weight = per_row.unsqueeze(-1).expand_as(student_masks_flat)[student_masks_flat]
        student, teacher = student_patch_tokens_masked, teacher_patch_tokens_masked
        if n_masked_patches is not None:
            n = int(n_masked_patches)
            student, teacher, masks_weight = student[:n], teacher[:n], masks_weight[:n]
        losses = soft_cross_entropy(student.unsqueeze(0), [teacher], self.student_temp).squeeze(0)  # [M]
        return (losses * masks_weight).sum() / student_masks_flat.shape[0]

    def _batch_sum(self, teacher_output: Tensor) -> Tensor:
        return teacher_output.mean(dim=1).sum(dim=0)
