"""The few collectives that losses need; all of them do nothing when there is no process group."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3.distributed import get_process_subgroup


def resolve_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """`group`, or the subgroup of this process if it is None; None where no group was initialised."""
    return get_process_subgroup() if group is None else group


def all_reduce(
    tensor: Tensor, group: dist.ProcessGroup | None, op: Any = dist.ReduceOp.SUM, async_op: bool = False
) -> dist.Work | None:
    """Reduce `tensor` in place over `group`; returns the handle to wait for if `async_op`."""
    if group is None or group.size() == 1:
        return None
    work: dist.Work | None = dist.all_reduce(tensor, op=op, group=group, async_op=async_op)
    return work


class _AllGather(torch.autograd.Function):
    """Concatenate the rows of all ranks; the gradient of a rank is the sum over ranks of that of its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.n_rows = group, x.shape[0]
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        total = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        first = ctx.group.rank() * ctx.n_rows
        return total[first : first + ctx.n_rows], None


def all_gather_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows [n, ...] of every rank in rank order, [world * n, ...]; differentiable. Every rank brings the same shape."""
    if group is None or group.size() == 1:
        return x
    gathered: Tensor = _AllGather.apply(x, group)
    return gathered
