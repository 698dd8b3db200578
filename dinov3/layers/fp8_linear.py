"""Linear layers whose matrix products with the activations run in float8 (e4m3), with one scale per row."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.layers.attention import LinearKMaskedBias
from dinov3.utils.modules import named_replace

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
_ALIGNMENT = 64  # of both feature sizes; what float8 kernels run well with


class Fp8Linear(nn.Linear):
    """A linear layer that quantises input rows and weight rows to float8; parameters stay in their dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to bfloat16 `[..., out_features]`."""
        return _fp8_linear(x, self.weight, self.bias)


class Fp8LinearKMaskedBias(LinearKMaskedBias):
    """`LinearKMaskedBias` in float8."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to bfloat16 `[..., out_features]`."""
        return _fp8_linear(x, self.weight, self.masked_bias())


def convert_linears_to_fp8(root: nn.Module, *, filter: str) -> nn.Module:
    """Replace the linear layers of `root` whose dotted name matches by float8 ones that share their tensors.

    Args:
        root: module, changed in place.
        filter: regular expression, matched anywhere in the name.

    Returns:
        The root (another module if it is itself a matching linear layer).

    Raises:
        RuntimeError: a feature size that is no multiple of 64.
        TypeError: a matching layer of another subclass of `nn.Linear`.
        AssertionError: nothing matches.
    """
    pattern = re.compile(filter)
    converted = 0

    def replace(module: nn.Module, name: str) -> nn.Module:
        nonlocal converted
        if not isinstance(module, nn.Linear) or not pattern.search(name):
            return module
        converted += 1
        return _as_fp8(module, name)

    root = named_replace(replace, root, include_root=True)
    if converted == 0:
        raise AssertionError(f"no linear layer has a name that matches {filter!r}: nothing was converted to fp8")
    return root


def _as_fp8(module: nn.Linear, name: str) -> nn.Linear:
    if type(module) not in (nn.Linear, LinearKMaskedBias):
        raise TypeError(f"{name}: can't convert a {type(module).__name__} to fp8, only Linear and LinearKMaskedBias")
    if module.in_features % _ALIGNMENT or module.out_features % _ALIGNMENT:
        raise RuntimeError(
            f"{name}: fp8 needs sizes that are multiples of {_ALIGNMENT}, got {module.in_features} -> "
            f"{module.out_features}; exclude it with the filter"
        )
    kind = Fp8LinearKMaskedBias if isinstance(module, LinearKMaskedBias) else Fp8Linear
    new = kind(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    new.weight, new.bias = module.weight, module.bias
    for buffer_name, buffer in module.named_buffers(recurse=False):
        setattr(new, buffer_name, buffer)
    return new.train(module.training)


def _fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.flatten(0, -2)
    out: Tensor = _Fp8Product.apply(rows, weight)
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.reshape(*x.shape[:-1], out.shape[-1])


class _Fp8Product(torch.autograd.Function):
    """`rows @ weight.T` with both operands in float8; the gradient of the weight is computed in the normal dtype."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _scaled_product(*_quantise(rows), *_quantise(weight))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            # One amax for the whole weight: the scales of its rows and of its columns are then the same.
            quantised = _quantise(weight.t(), amax=weight.abs().max().float().expand(weight.shape[1], 1))
            grad_rows = _scaled_product(*_quantise(grad_out), *quantised).to(rows.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_out.t() @ rows.to(grad_out.dtype)).to(weight.dtype)
        return grad_rows, grad_weight


def _quantise(x: Tensor, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows `[M, K]` as float8 and their scales `[M, 1]` in float32."""
    if amax is None:
        amax = x.abs().amax(dim=-1, keepdim=True).float()
    scale = amax.clamp(min=1e-12) / _FP8_MAX
    return (x / scale).to(torch.float8_e4m3fn).contiguous(), scale


def _scaled_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """`(a * a_scale) @ (b * b_scale).T` in bfloat16, for float8 `a [M, K]` and `b [N, K]`."""
    if a.device.type == "cpu":  # which has no such kernel before torch 2.8; products of float8 are exact in float32
        product = (a.float() @ b.float().t()).to(torch.bfloat16)
    else:
        one = torch.ones((), device=a.device, dtype=torch.float32)
        product = torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=False)
    return (product * a_scale * b_scale.t()).to(torch.bfloat16)
