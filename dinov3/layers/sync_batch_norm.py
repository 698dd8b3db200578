"""Batch normalisation over the batches of all processes, on any device. Owner of what torch offers for GPUs only."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# Where torch has kernels of its own for synchronised statistics; its class refuses all others by this list of names.
_FUSED = ("cuda", "xpu", "hpu")


class SyncBatchNorm(nn.SyncBatchNorm):
    """`nn.SyncBatchNorm` that works on CPUs (and other devices without kernels for it) too.

    In training mode mean and variance are those of all processes of the group together; without a group, or in
    evaluation mode, it is ordinary batch normalisation. Names, options and gradients are those of the base class.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, ...]` to the same shape; processes may bring batches of different sizes."""
        group = _group_of(self.process_group) if self.training else None
        if x.device.type in _FUSED:
            return super().forward(x)
        if group is None:  # not the base class, which refuses these devices where there is a group, also of one process
            return nn.modules.batchnorm._BatchNorm.forward(self, x)
        axes = [0, *range(2, x.ndim)]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        values = x.float()
        count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        dist.all_reduce(count, group=group)
        mean = _AllReduce.apply(values.sum(axes), group) / count
        centred = values - mean.view(shape)
        variance = _AllReduce.apply(centred.square().sum(axes), group) / count
        self._update_running(mean.detach(), (variance * count / (count - 1).clamp(min=1)).detach())
        normed = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normed = normed * self.weight.view(shape) + self.bias.view(shape)
        return normed.to(x.dtype)

    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


def _group_of(group: Any) -> Any:
    """`group`, or that of all processes; None where a process is alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is None else group
    return group if dist.get_world_size(group) > 1 else None


class _AllReduce(torch.autograd.Function):
    """Sum over processes; so is the gradient, since every process's output depends on every process's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad = grad_outputs[0].clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with fixed statistics and a fixed scale and shift: four buffers, no parameters."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps)
