"""DINO: cross-entropy between prototype assignments of the CLS tokens of student and teacher crops."""

import functools

import torch
from torch import Tensor

from dinov3.loss.centering import CenteredLoss
from dinov3.loss.cross_entropy import soft_cross_entropy
from dinov3.loss.sinkhorn_knopp import sinkhorn_knopp


class DINOLoss(CenteredLoss):
    """Mean cross-entropy over samples and pairs of a student crop with a teacher crop.

    Args:
        out_dim: number of prototypes K.
        student_temp: temperature of the student's logits.
        center_momentum: of the centring alternative, see `CenteredLoss`.

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", equation 3.
    """

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, out_dim), center_momentum)
        self.student_temp = student_temp

    def forward(self, student_logits: Tensor, teacher_probs: Tensor, ignore_diagonal: bool = False) -> Tensor:
        """Loss of all pairs of crops, or of those with different indices.

        Args:
            student_logits: [S, B, K].
            teacher_probs: [T, B, K], constants.
            ignore_diagonal: drop the pairs in which student and teacher crop have the same index.

        Returns:
            Scalar in float32; 0 if no pair is left.

        Raises:
            ValueError: shapes don't fit.
        """
        if student_logits.ndim != 3 or teacher_probs.ndim != 3 or student_logits.shape[1:] != teacher_probs.shape[1:]:
            raise ValueError(
                "DINOLoss expects student logits [S, B, K] and teacher probabilities [T, B, K] of equal B and K, got "
                f"{tuple(student_logits.shape)} and {tuple(teacher_probs.shape)}"
            )
        n_student, n_samples, _ = student_logits.shape
        n_teacher = teacher_probs.shape[0]
        n_pairs = n_student * n_teacher - (min(n_student, n_teacher) if ignore_diagonal else 0)
        # Targets of one student crop: the sum of the teacher crops it is compared with. No sum is made of a single one.
        all_crops = list(range(n_teacher))
        if ignore_diagonal:
            targets = [_sum_of(teacher_probs, [t for t in all_crops if t != s]) for s in range(n_student)]
        else:
            targets = [_sum_of(teacher_probs, all_crops)] * n_student
        losses = soft_cross_entropy(student_logits, targets, self.student_temp)
        return losses.sum() / max(1, n_pairs * n_samples)

    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3, *, inplace: bool = False
    ) -> Tensor:
        """Targets [n, K] from teacher logits [n, K], normalised over the subgroup; see `sinkhorn_knopp`."""
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations=n_iterations, inplace=inplace)


def _sum_of(probs: Tensor, crops: list[int]) -> Tensor:
    """Sum of `probs` [T, B, K] over some crops; a view if there is only one."""
    if not crops:
        return torch.zeros_like(probs[0])
    return functools.reduce(torch.add, (probs[t] for t in crops))
