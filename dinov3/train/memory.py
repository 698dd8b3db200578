"""Where the memory of a training goes, and what to change when there is not enough."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dinov3.train.meta_arch import MetaArch

MIB = 2**20


def memory_by_part(model: MetaArch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """MiB that this process holds between iterations, by part; `at the peak` is the device's peak, if it is known."""
    student = list(model.student.parameters())
    frozen = {id(part): part for part in (model.model_ema, model.teacher, model.gram_teacher) if part is not None}
    parts = {
        "student": _mib(student),
        "gradients": _mib(param.grad for param in student if param.grad is not None),
        "optimizer": _mib(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)),
        "teachers": _mib(param for part in frozen.values() for param in part.parameters()),
    }
    device = student[0].device
    if device.type != "cpu":
        parts["at the peak"] = torch.accelerator.max_memory_allocated(device) / MIB
    return parts


def explain_out_of_memory(error: BaseException, cfg: Any, parts: dict[str, float]) -> str:
    """What ran out, what holds memory, and the settings that need less, the cheapest in time first."""
    n_parts, batch_size = cfg.train.get("gradient_accumulation", 1), cfg.train.batch_size_per_gpu
    advice = []
    if not cfg.train.checkpointing:
        advice.append("train.checkpointing=true (recomputes activations)")
    elif not cfg.train.checkpointing_full:
        advice.append("train.checkpointing_full=true")
    if batch_size % (2 * n_parts) == 0:
        advice.append(f"train.gradient_accumulation={2 * n_parts} (the batch in smaller parts, same number of images)")
    if batch_size > 1:
        advice.append(f"train.batch_size_per_gpu={batch_size // 2}")
    advice.append("more processes (parameters, gradients and moments are spread over them)")
    held = ", ".join(f"{name} {mib:.0f}" for name, mib in parts.items())
    return f"Out of memory ({error}). MiB by part: {held}. What needs less: {'; '.join(advice)}"


def _mib(tensors: Iterable[Tensor]) -> float:
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local) / MIB
