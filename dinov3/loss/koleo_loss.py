"""KoLeo: spreads features by pushing every sample away from its nearest neighbours.

Source: Sablayrolles et al., "Spreading vectors for similarity search", section 3.2.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.loss.collectives import all_gather_rows, resolve_group

EPS = 1e-8


class KoLeoLoss(nn.Module):
    """-mean log(distance to the nearest neighbour) of the L2-normalised samples of this rank."""

    def forward(self, student_output: Tensor) -> Tensor:
        """Loss of samples [B, D]: a scalar in float32.

        Duplicates give a finite loss and gradient, because distances are at least about 1e-8. A single sample has no
        neighbour: the loss is 0 and so is its gradient.
        """
        with torch.autocast(student_output.device.type, enabled=False):
            x = _normalize(student_output)
            return _neighbour_loss(x, x, first_own_row=0, topk=1)


class KoLeoLossDistributed(nn.Module):
    """KoLeo among the samples of several ranks.

    Samples of the process subgroup (the whole world, unless several students are trained at once) are gathered in rank
    order and cut into consecutive groups; neighbours are looked for inside a group. The gather is differentiable: the
    gradient on a rank is that of the sum of the losses of all ranks.

    Args:
        topk: number of nearest neighbours, all of which count in the mean.
        loss_group_size: samples per group, a multiple of a rank's batch; None: all gathered samples.
    """

    def __init__(self, topk: int = 1, loss_group_size: int | None = None) -> None:
        super().__init__()
        self.topk = topk
        self.loss_group_size = loss_group_size

    def forward(self, student_output: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """Loss of this rank's samples [B, D], a scalar in float32; 0 if the group has a single sample.

        Args:
            student_output: as many samples on every rank.
            group: ranks whose samples are gathered; None: the subgroup of this process.

        Raises:
            ValueError: `loss_group_size` isn't a multiple of B or doesn't divide the number of gathered samples, or
                there are fewer than `topk` neighbours.
        """
        group = resolve_group(group)
        rank, world = (0, 1) if group is None else (group.rank(), group.size())
        n = student_output.shape[0]
        size = n * world if self.loss_group_size is None else self.loss_group_size
        if size % n or n * world % size:
            raise ValueError(
                f"loss_group_size must be a multiple of the batch of a rank ({n}) and divide the number of samples of "
                f"all ranks ({n * world}), got {size}"
            )
        if 1 < size <= self.topk:
            raise ValueError(f"topk={self.topk} neighbours need groups of at least {self.topk + 1} samples, got {size}")
        ranks_per_group = size // n
        with torch.autocast(student_output.device.type, enabled=False):
            x = _normalize(student_output)
            candidates = all_gather_rows(x, group).split(size)[rank // ranks_per_group]
            return _neighbour_loss(x, candidates, first_own_row=rank % ranks_per_group * n, topk=self.topk)


def _normalize(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=EPS)


def _neighbour_loss(x: Tensor, candidates: Tensor, *, first_own_row: int, topk: int) -> Tensor:
    """-mean log distance of rows x [B, D] to their `topk` nearest candidates [C, D].

    Row i of x is candidate first_own_row + i, and not its own neighbour.
    """
    if candidates.shape[0] < 2:
        return candidates.sum() * 0.0  # no neighbour; a sum, so that gradients (zeros) and NaN still arrive
    with torch.no_grad():
        similarity = x @ candidates.T
        rows = torch.arange(x.shape[0], device=x.device)
        similarity[rows, rows + first_own_row] = -1
        neighbours = similarity.topk(topk, dim=1).indices.flatten()  # [B * topk]
    # eps is added to every component of the difference, which keeps the gradient at duplicates finite
    distances = F.pairwise_distance(x.repeat_interleave(topk, dim=0), candidates[neighbours], p=2, eps=EPS)
    return -(distances + EPS).log().mean()
