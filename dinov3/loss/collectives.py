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
        ctx.group, ctx.shape = group, x.shape
        gathered = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        mine = grad.new_empty(ctx.shape)
        dist.reduce_scatter_tensor(mine, grad.contiguous(), group=ctx.group)
        return mine, None


def all_gather_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows [n, ...] of every rank in rank order, [world * n, ...]; differentiable. Every rank brings the same shape."""
    if group is None or group.size() == 1:
        return x
    gathered: Tensor = _AllGather.apply(x, group)
    return gathered
