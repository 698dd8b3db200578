"""Optimizer of the student: construction, per-iteration settings, gradient clipping."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def build_optimizer(cfg: Any, params_groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW over parameter groups, with the betas of the `optim` section."""
    return torch.optim.AdamW(params_groups, betas=(cfg.optim.adamw_beta1, cfg.optim.adamw_beta2))


def apply_optim_scheduler(optimizer: torch.optim.Optimizer, lr: float, wd: float, last_layer_lr: float) -> None:
    """Set this iteration's learning rate and weight decay of each group, by its multipliers."""
    for group in optimizer.param_groups:
        group["weight_decay"] = wd * group["wd_multiplier"]
        group["lr"] = (last_layer_lr if group["is_last_layer"] else lr) * group["lr_multiplier"]


def hold_still(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> None:
    """Give the groups of these parameters the learning rate 0 in this iteration."""
    held = {id(param) for param in params}
    for group in optimizer.param_groups:
        if any(id(param) in held for param in group["params"]):
            group["lr"] = 0.0


def clip_gradients(student: nn.ModuleDict, max_norm: float | None) -> dict[str, Tensor]:
    """Clip each sub-module of the student by its own L2 norm; returns `<name>_grad_norm` before clipping.

    Args:
        student: modules whose gradients are set.
        max_norm: largest norm allowed; None or 0: nothing is clipped and no norm is computed.
    """
    if not max_norm:
        return {}
    norms = {}
    for name, part in student.items():
        norm = nn.utils.clip_grad_norm_(part.parameters(), max_norm=max_norm)
        norms[f"{name}_grad_norm"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return norms


def gradient_norm(module: nn.Module) -> Tensor:
    """L2 norm of all gradients of a module, sharded or not."""
    norm = nn.utils.get_total_norm([param.grad for param in module.parameters() if param.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
