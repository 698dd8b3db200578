"""Layers of a transformer block taken together in training: they keep less for the backward pass than one by one.

A block keeps its input, queries, keys, values, what attention gives, and the feed-forward network's input and hidden
features before the activation: ten widths for each token, where layers on their own keep eighteen. Normalised tokens
and activated features are computed again, which costs less than to write and to read them; the gradient of a layer
scale is found in that of the weights before it. Products go through oneDNN where `layers/linear.py` allows it.
"""

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinov3.layers.layer_scale import LayerScale
from dinov3.layers.linear import is_plain, linear
from dinov3.layers.rope_position_encoding import is_traced


def may_fuse() -> bool:
    """Whether autograd records what is computed, and it does so plainly: eagerly, no `torch.func`, no autocast."""
    transformed = is_traced() or torch._C._are_functorch_transforms_active() or torch.is_autocast_enabled("cpu")
    return torch.is_grad_enabled() and not transformed and not torch.is_autocast_enabled()


def is_plain_norm(norm: Any) -> TypeGuard[nn.LayerNorm]:
    """Whether it is a layer norm over the last axis with weight and bias, and nothing else."""
    return is_plain(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1 and norm.bias is not None


def is_plain_scale(scale: Any) -> TypeGuard[LayerScale | nn.Identity]:
    """Whether it is a layer scale, or none, and nothing else."""
    return is_plain(scale, LayerScale) or is_plain(scale, nn.Identity)


def norm_linear(x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`norm(x) weight^T + bias`: `[..., D]` to `[..., out_features]`; keeps `x` alone."""
    out: Tensor = _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, weight, bias)
    return out


def scaled_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: LayerScale | nn.Identity, gelu: bool = False
) -> Tensor:
    """`scale(x weight^T + bias)`, with `gelu` of `gelu(x)`: `[..., in_features]` to `[..., D]`; keeps `x` alone."""
    gamma = scale.gamma if isinstance(scale, LayerScale) else None
    out: Tensor = _ScaledLinear.apply(x, weight, bias, gamma, gelu)
    return out


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, weight)
        ctx.eps = eps
        return linear(normed, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        (grad,) = grads
        rows, shape = grad.flatten(0, -2), norm_weight.shape
        needs_x, needs_norm_weight, needs_norm_bias, _, needs_weight, needs_bias = ctx.needs_input_grad
        grad_weight = None
        if needs_weight:
            normed = torch.native_layer_norm(x, shape, norm_weight, norm_bias, ctx.eps)[0]
            grad_weight = rows.t() @ normed.flatten(0, -2)
            del normed
        grad_normed = linear(grad, weight.t(), None)
        grad_norm = torch.ops.aten.native_layer_norm_backward(
            grad_normed, x, shape, mean, rstd, norm_weight, norm_bias, [needs_x, needs_norm_weight, needs_norm_bias]
        )
        return *grad_norm, None, grad_weight, rows.sum(dim=0) if needs_bias else None


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, gelu: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias, scale)
        ctx.gelu = gelu
        inputs, out = x.flatten(0, -2), x.new_empty(x.shape[:-1].numel(), len(weight))
        for some in _rows_at_a_time(inputs):
            out[some] = linear(F.gelu(inputs[some]) if gelu else inputs[some], weight, bias)
        return (out if scale is None else out.mul_(scale)).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale = ctx.saved_tensors
        inputs, rows = x.flatten(0, -2), grads[0].flatten(0, -2)
        needs_x, needs_weight, needs_bias, needs_scale, _ = ctx.needs_input_grad
        # y = s (W x + b). With G, the sum over tokens of dy x^T: dW = s G; ds: W G summed over inputs, and b sum dy.
        products = torch.zeros_like(weight) if needs_weight or needs_scale else None
        sums = rows.sum(dim=0) if bias is not None and (needs_bias or needs_scale) else None
        grad_x = torch.empty_like(inputs) if needs_x else None
        scaled_weight = weight if scale is None else weight * scale.unsqueeze(1)
        for some in _rows_at_a_time(inputs):
            if products is not None:
                products.addmm_(rows[some].t(), F.gelu(inputs[some]) if ctx.gelu else inputs[some])
            if grad_x is not None:
                grad = linear(rows[some], scaled_weight.t(), None)
                grad_x[some] = torch.ops.aten.gelu_backward(grad, inputs[some]) if ctx.gelu else grad
        grad_scale = None
        if needs_scale:
            assert products is not None
            grad_scale = (products * weight).sum(dim=1)
            if sums is not None:
                grad_scale += sums * bias
        grad_weight = products if scale is None or products is None else products.mul_(scale.unsqueeze(1))
        grad_bias = sums if scale is None or sums is None else sums * scale
        return (
            None if grad_x is None else grad_x.view(x.shape),
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            grad_scale,
            None,
        )


def _rows_at_a_time(x: Tensor) -> Iterator[slice]:
    """Parts of the rows of `x` [n, width]: on a CPU few enough to stay in the cache, else all."""
    step = max(1, _NUMBERS_AT_A_TIME // x.shape[1]) if x.device.type == "cpu" else max(1, len(x))
    return (slice(start, start + step) for start in range(0, len(x), step))


_NUMBERS_AT_A_TIME = 2**21
