"""Activation checkpointing, compilation, sharding and first weights of a dino.txt model that is still empty."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dinov3 import distributed
from dinov3.eval.probe import broadcast_parameters
from dinov3.eval.text.dinotxt_model import DINOTxt
from dinov3.fsdp import checkpoint_activations, compile_modules, init_weights, shard_module
from dinov3.utils.device import default_device


def ac_compile_parallelize_and_init(
    model: DINOTxt,
    build: Callable[[], DINOTxt],
    *,
    use_fsdp: bool = True,
    do_compile: bool = False,
    use_ac: bool = True,
    use_full_ac: bool = False,
    use_cuda_graphs: bool = False,
    param_dtype_str: str = "bf16",
    reduce_dtype_str: str = "fp32",
    process_group: dist.ProcessGroup | None = None,
) -> torch.device:
    """Prepare a model in place, allocate it on the device, and give it random weights, the same on all processes.

    Args:
        model: on the meta device.
        build: makes another one.
        use_fsdp: shard backbone and head of each tower, where there are several processes or an accelerator. The
            scale of the similarities stays whole: its gradient is averaged by the training.
        do_compile, use_cuda_graphs: compile blocks and projections, on an accelerator.
        use_ac, use_full_ac: recompute activations of trained blocks.
        param_dtype_str, reduce_dtype_str: with FSDP, to compute and to average gradients in.
        process_group: default: the world.

    Returns:
        The device.
    """
    device = default_device()
    parts = _parts(model)
    for part, _ in parts:
        if use_ac and any(parameter.requires_grad for parameter in part.parameters()) and _blocks(part):
            checkpoint_activations(part, full=use_full_ac)
    if do_compile:
        units = [unit for part, _ in parts for unit in _units(part)]
        compile_modules(
            [unit for unit in units if not isinstance(unit, nn.Linear)],
            [unit for unit in units if isinstance(unit, nn.Linear)],
            device,
            cudagraphs=use_cuda_graphs,
        )
    group = distributed.get_default_process_group() if process_group is None else process_group
    if use_fsdp and group is not None and (group.size() > 1 or device.type != "cpu"):
        for part, methods in parts:
            if any(True for _ in part.parameters()):
                shard_module(
                    part,
                    _units(part),
                    group,
                    device,
                    param_dtype=param_dtype_str,
                    reduce_dtype=reduce_dtype_str,
                    forward_methods=methods,
                )
    model.to_empty(device=device)
    init_weights(model, build, group)
    if not use_fsdp:
        broadcast_parameters([*model.parameters(), *model.buffers()])
    return device


def _parts(model: DINOTxt) -> list[tuple[Any, Sequence[str]]]:
    """What is sharded as a whole, with methods that are called beside `forward`."""
    return [
        (model.visual_model.backbone, ("get_intermediate_layers",)),
        (model.visual_model.head, ()),
        (model.text_model.backbone, ()),
        (model.text_model.head, ()),
    ]


def _units(part: Any) -> list[nn.Module]:
    """What is sharded and compiled by itself; whatever backbone a user gives, at least its whole."""
    return list(part.wrap_units()) if hasattr(part, "wrap_units") else []


def _blocks(part: Any) -> list[nn.Module]:
    return list(part.checkpoint_units()) if hasattr(part, "checkpoint_units") else _units(part)
