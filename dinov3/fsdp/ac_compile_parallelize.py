"""Prepare built (still empty) models for training: activation checkpointing, compile, FSDP2, device.

Sees modules and the backbone protocol only, never a model class.
"""

import dataclasses
import logging
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from dinov3 import distributed
from dinov3.fsdp.activation_checkpointing import checkpoint_activations
from dinov3.utils.device import default_device
from dinov3.utils.dtype import dtype_dict, resolve_compute_dtype
from dinov3.utils.utils import has_batchnorms

logger = logging.getLogger("dinov3")


def ac_compile_parallelize(
    trained_model: nn.ModuleDict,
    inference_only_models: Sequence[nn.ModuleDict],
    cfg: Any,
    trained_model_process_group: dist.ProcessGroup | None = None,
    inference_only_models_process_groups: Sequence[dist.ProcessGroup | None] | None = None,
    *,
    allow_batchnorms: bool = False,
) -> torch.device:
    """Apply activation checkpointing, compilation and sharding in place, then allocate the models on the device.

    The tensors are uninitialised afterwards. A model is sharded where its process group has several ranks, and on an
    accelerator also where it has one (mixed precision comes with it); without a process group it is a plain module.

    Args:
        trained_model: has a `backbone` and any heads.
        inference_only_models: the same without gradients (teachers).
        cfg: merged training configuration.
        trained_model_process_group: group over which the trained model is sharded.
        inference_only_models_process_groups: one per inference-only model; None: none is sharded.
        allow_batchnorms: take models with batch norms in a job of one process; they stay plain modules.

    Returns:
        The device on which the models are.

    Raises:
        NotImplementedError: a model has batch norms, whose statistics would differ between ranks.
        ValueError: the trained model has no backbone, or the numbers of models and groups differ.
    """
    models = [trained_model, *inference_only_models]
    frozen_groups = inference_only_models_process_groups or [None] * len(inference_only_models)
    if len(frozen_groups) != len(inference_only_models):
        raise ValueError(
            f"got {len(frozen_groups)} process groups for {len(inference_only_models)} inference-only models"
        )
    if "backbone" not in trained_model:
        raise ValueError(f"the trained model needs a `backbone`, got {list(trained_model)}")
    alone = distributed.get_world_size() == 1
    if any(has_batchnorms(model) for model in models) and not (allow_batchnorms and alone):
        raise NotImplementedError(
            "batch norms are not supported in sharded training; use layer norm (head use_bn=False)"
            + (", or one process" if allow_batchnorms else "")
        )

    device = default_device()
    if cfg.train.checkpointing:
        checkpoint_activations(trained_model["backbone"], full=cfg.train.checkpointing_full)
    if cfg.train.compile:
        _compile(models, device, cudagraphs=cfg.train.cudagraphs)
    for model, group in zip(models, [trained_model_process_group, *frozen_groups], strict=True):
        several = group is not None and (distributed.get_world_size(group) > 1 or device.type != "cpu")
        if group is not None and several and not has_batchnorms(model):
            _shard(model, group, device, cfg.compute_precision)
            if model is not trained_model:
                _reshard_after_forward(model)
        model.to_empty(device=device)
    return device


def _compile(models: Sequence[nn.ModuleDict], device: torch.device, *, cudagraphs: bool) -> None:
    """Compile each unit of each backbone, and each head, in place (names stay as they are)."""
    parts = [(name, part) for model in models for name, part in model.items()]
    units = [unit for name, part in parts if name == "backbone" for unit in units_of(part)]
    compile_modules(units, [part for name, part in parts if name != "backbone"], device, cudagraphs=cudagraphs)


def compile_modules(
    units: Iterable[nn.Module], others: Iterable[nn.Module], device: torch.device, *, cudagraphs: bool = False
) -> None:
    """Compile modules one by one, in place (names stay as they are); on a CPU do nothing.

    Args:
        units: blocks; with `cudagraphs` they run as CUDA graphs.
        others: what is compiled without.
        device: where they will run.
        cudagraphs: see there.
    """
    if device.type == "cpu":
        logger.info("compilation is left out on a CPU: training gains nothing there, and compiling takes minutes")
        return
    import torch._dynamo

    # Each crop resolution is compiled for its own static shape.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.cache_size_limit = 1024
    options: dict[str, Any] = (
        {"fullgraph": True, "dynamic": False, "options": {"triton.cudagraphs": True}} if cudagraphs else {}
    )
    for unit in units:
        unit.compile(**options)
    for module in others:
        module.compile()


def _shard(model: nn.ModuleDict, group: dist.ProcessGroup, device: torch.device, precision: Any) -> None:
    """`shard_module` for every part."""
    for name, part in model.items():
        is_backbone = name == "backbone"
        shard_module(
            part,
            units_of(part) if is_backbone else (),
            group,
            device,
            param_dtype=precision.param_dtype,
            reduce_dtype=precision.reduce_dtype,
            forward_methods=("get_intermediate_layers",) if is_backbone else (),
        )


def shard_module(
    module: nn.Module,
    units: Sequence[nn.Module],
    group: dist.ProcessGroup,
    device: torch.device,
    *,
    param_dtype: str,
    reduce_dtype: str,
    forward_methods: Sequence[str] = (),
) -> None:
    """`fully_shard` per unit, then for the rest of the module. Parameters stay float32.

    Args:
        module: still on the meta device.
        units: parts of it, in forward order.
        group: the processes to share it among.
        device: where it will run.
        param_dtype, reduce_dtype: names of the dtypes to compute and to average gradients in.
        forward_methods: methods of the module that are called instead of `forward`.
    """
    to_reduce = resolve_compute_dtype(dtype_dict[reduce_dtype], device)
    if device.type == "cpu":
        # Of float32 gradients the backend is to take the mean, and gloo of torch 2.7 leaves the sum.
        to_reduce = torch.float64
    policy = MixedPrecisionPolicy(
        param_dtype=resolve_compute_dtype(dtype_dict[param_dtype], device), reduce_dtype=to_reduce
    )
    # Inside a module tokens have the right dtype already, and position tables must keep theirs.
    without_casts = dataclasses.replace(policy, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": DeviceMesh.from_group(group, device.type), "reshard_after_forward": True}
    # Backbones return views (tokens by kind); nothing here works in place on them, which is what torch warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for unit in units:
        fully_shard(unit, mp_policy=without_casts, **options)
    _prefetch_neighbours(units)
    fully_shard(module, mp_policy=policy, **options)
    for name in forward_methods:
        register_fsdp_forward_method(module, name)


def _reshard_after_forward(model: nn.ModuleDict) -> None:
    """Free what the root of each part gathered: no backward pass will, and the shards are what is updated.

    `fully_shard(reshard_after_forward=True)` includes the root from torch 2.8 on only.
    """
    for part in model.values():
        part.register_forward_hook(lambda module, args, output: module.reshard())


def synchronize_gradients(trained_model: nn.ModuleDict, *, enabled: bool) -> None:
    """Whether the next backward pass averages gradients over processes, or leaves that to a later one."""
    for part in trained_model.values():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(enabled)


def units_of(backbone: Any) -> list[Any]:
    """The modules of a backbone that are compiled and sharded one by one."""
    return list(backbone.wrap_units())


def _prefetch_neighbours(units: Sequence[Any]) -> None:
    """Gather the next unit's parameters while one computes, forward and backward."""
    for before, after in zip(units, units[1:], strict=False):
        before.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([before])
