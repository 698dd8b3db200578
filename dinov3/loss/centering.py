"""Centring of teacher outputs, the alternative to Sinkhorn-Knopp of the first DINO; training does not use it."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov3.loss.collectives import all_reduce, resolve_group


class CenteredLoss(nn.Module):
    """A loss with a running centre of teacher outputs in the buffer `center`.

    The buffer is built as NaN, so that a forgotten `init_weights` shows. The update is delayed: `update_center` starts
    an all-reduce over the process subgroup that is only waited for when the centre is next needed.
    """

    center: Tensor

    def __init__(self, center_shape: tuple[int, ...], center_momentum: float) -> None:
        super().__init__()
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.full(center_shape, math.nan))
        self._pending: tuple[Tensor, dist.Work | None, int] | None = None

    def init_weights(self) -> None:
        """Zero the centre and forget any pending update."""
        self.center.zero_()
        self._pending = None

    @torch.no_grad()
    def softmax_center_teacher(
        self, teacher_output: Tensor, teacher_temp: float, update_centers: bool = True
    ) -> Tensor:
        """softmax((teacher_output - center) / teacher_temp) over the last axis, in float32.

        A pending update of the centre is applied first if `update_centers`.
        """
        if update_centers:
            self.apply_center_update()
        return torch.softmax((teacher_output.float() - self.center) / teacher_temp, dim=-1)

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Record the sum of `teacher_output` over the subgroup; the centre changes at `apply_center_update`.

        An update that is still pending is applied first.
        """
        self.apply_center_update()
        group = resolve_group(None)
        total = self._batch_sum(teacher_output.float())
        count = len(teacher_output) * (1 if group is None else group.size())
        self._pending = total, all_reduce(total, group, async_op=True), count

    @torch.no_grad()
    def apply_center_update(self) -> None:
        """center <- momentum * center + (1 - momentum) * mean of the recorded outputs, if there is an update."""
        if self._pending is None:
            return
        total, work, count = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        self.center.lerp_((total / count).view_as(self.center), 1 - self.center_momentum)

    def _batch_sum(self, teacher_output: Tensor) -> Tensor:
        return teacher_output.sum(dim=0)
