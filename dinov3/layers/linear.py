"""Linear layers outside autograd on a CPU: through oneDNN, with the activation in the same pass.

torch's own product there is MKL's, which on many processors does not use their widest instructions: 10 to 35 % slower.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias`: `[..., in_features]` to `[..., out_features]`."""
    return _product(x, weight, bias, "none") if _may_use_onednn(x, weight, bias) else F.linear(x, weight, bias)


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`."""
    if not is_plain(layer, nn.Linear):
        return cast(Tensor, layer(x))
    return linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]


def apply_linear_and_activation(layer: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    """`activation(layer(x))`; an exact GELU costs nothing then."""
    if is_plain(layer, nn.Linear) and is_plain(activation, nn.GELU) and activation.approximate == "none":
        weight, bias = cast(tuple[Tensor, Tensor | None], (layer.weight, layer.bias))
        if _may_use_onednn(x, weight, bias):
            return _product(x, weight, bias, "gelu")
    return cast(Tensor, activation(apply_linear(layer, x)))


def feed_forward(x: Tensor, first: nn.Module, activation: nn.Module, dropout: nn.Module, second: nn.Module) -> Tensor:
    """`second(dropout(activation(first(x))))` for activations that take each row by itself.

    Outside autograd some rows at a time: what is between the layers, much wider than they are, stays in the cache then.
    """
    if _may_split(x, first, activation, dropout, second):
        step = max(1, _HIDDEN_NUMBERS // cast(nn.Linear, first).out_features)
        rows = x.flatten(0, -2)
        if len(rows) > step:
            out = torch.cat([feed_forward(some, first, activation, dropout, second) for some in rows.split(step)])
            return out.view(*x.shape[:-1], -1)
    return apply_linear(second, dropout(apply_linear_and_activation(first, activation, x)))


def _may_split(x: Tensor, first: nn.Module, activation: nn.Module, dropout: nn.Module, second: nn.Module) -> bool:
    """Whether these may be called several times with a part of the input each."""
    if not (is_plain(first, nn.Linear) and is_plain(second, nn.Linear)):
        return False
    unhooked = all(is_plain(module, type(module)) for module in (activation, dropout))
    return unhooked and _may_use_onednn(x, cast(Tensor, first.weight), cast(Tensor, second.weight))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none"))


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what its class does: no subclass (adapters, float8), no hooks."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module) is kind and not any(hooks)


def _may_use_onednn(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether that product exists for these tensors, and nobody records what is computed."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or not _HAS_ONEDNN or not torch.backends.mkldnn.enabled:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    if _get_current_dispatch_mode() is not None:  # somebody looks on who knows torch's own operators: counts of FLOPs
        return False
    plain = all(type(p) in (Tensor, nn.Parameter) and p.dtype == torch.float32 for p in parameters if p is not None)
    return plain and type(x) is Tensor and x.dtype == torch.float32 and x.ndim > 1 and x.numel() > 0


# Of a feed-forward network between its layers, at a time: 8 MiB.
_HIDDEN_NUMBERS = 2**21
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
