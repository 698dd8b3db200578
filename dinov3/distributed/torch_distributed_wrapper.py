"""The process groups of this process: set-up, questions about them, and teardown.

The world may be cut into disjoint subgroups once (multi-distillation trains one student per subgroup). "The subgroup"
is the world where nobody did so, and a group of one where there is no process group at all.
"""

import builtins
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dinov3.distributed.environment import JobType, TorchDistributedEnvironment
from dinov3.utils.device import default_device

logger = logging.getLogger("dinov3")

__all__ = [
    "JobType",
    "TorchDistributedEnvironment",
    "disable_distributed",
    "enable_distributed",
    "get_default_process_group",
    "get_process_subgroup",
    "get_rank",
    "get_subgroup_rank",
    "get_subgroup_size",
    "get_world_size",
    "is_distributed_enabled",
    "is_main_process",
    "is_subgroup_main_process",
    "new_subgroups",
    "save_in_main_process",
]

_EXPORTED = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
)


@dataclass
class _State:
    """What `enable_distributed` and `new_subgroups` changed, for `disable_distributed` to undo."""

    subgroup: dist.ProcessGroup | None = None
    builtin_print: Callable[..., None] | None = None
    environment: dict[str, str | None] = field(default_factory=dict)


_state = _State()


def is_distributed_enabled() -> bool:
    """Whether a default process group exists."""
    return dist.is_available() and dist.is_initialized()


def get_default_process_group() -> dist.ProcessGroup | None:
    """The group of all processes; None if none was initialised."""
    return dist.group.WORLD if is_distributed_enabled() else None


def get_rank(group: dist.ProcessGroup | None = None) -> int:
    """Rank of this process in `group` (default: the world); 0 without a process group."""
    return dist.get_rank(group) if is_distributed_enabled() else 0


def get_world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes of `group` (default: the world); 1 without a process group."""
    return dist.get_world_size(group) if is_distributed_enabled() else 1


def is_main_process(group: dist.ProcessGroup | None = None) -> bool:
    """Whether this process has rank 0 in `group` (default: the world)."""
    return get_rank(group) == 0


def get_process_subgroup() -> dist.ProcessGroup | None:
    """The subgroup of this process: one of `new_subgroups`, else the world, else None (no process group)."""
    return get_default_process_group() if _state.subgroup is None else _state.subgroup


def get_subgroup_rank() -> int:
    """Rank of this process in its subgroup."""
    return get_rank(get_process_subgroup())


def get_subgroup_size() -> int:
    """Number of processes of the subgroup of this process."""
    return get_world_size(get_process_subgroup())


def is_subgroup_main_process() -> bool:
    """Whether this process has rank 0 in its subgroup."""
    return get_subgroup_rank() == 0


def save_in_main_process(*args: Any, group: dist.ProcessGroup | None = None, **kwargs: Any) -> None:
    """`torch.save(*args, **kwargs)` in rank 0 of `group` (default: the world), nothing in the others."""
    if is_main_process(group):
        torch.save(*args, **kwargs)


def new_subgroups(all_subgroup_ranks: Sequence[Sequence[int]]) -> None:
    """Cut the world into subgroups; every process calls this once with the same argument.

    Args:
        all_subgroup_ranks: ranks of each subgroup. Disjoint; one of them holds this process.

    Raises:
        RuntimeError: no process group, or subgroups exist already.
        ValueError: the ranks overlap, are out of range, or leave out this process.
    """
    if not is_distributed_enabled():
        raise RuntimeError("there are no processes to group: call dinov3.distributed.enable() first")
    if _state.subgroup is not None:
        raise RuntimeError("the subgroups were created before; dinov3.distributed.disable() removes them")
    ranks = [rank for subgroup in all_subgroup_ranks for rank in subgroup]
    if len(ranks) != len(set(ranks)):
        raise ValueError(f"subgroups must be disjoint, got {all_subgroup_ranks!r}")
    if any(not 0 <= rank < get_world_size() for rank in ranks):
        raise ValueError(
            f"subgroups must hold ranks below the world size {get_world_size()}, got {all_subgroup_ranks!r}"
        )
    if get_rank() not in ranks:
        raise ValueError(f"no subgroup holds rank {get_rank()}: got {all_subgroup_ranks!r}")
    for subgroup in all_subgroup_ranks:
        # Creating a group is a collective of the world: also those outside take part, in the same order.
        group = dist.new_group(list(subgroup))
        if isinstance(group, dist.ProcessGroup):  # this process is a member
            _state.subgroup = group


def enable_distributed(
    *,
    set_cuda_current_device: bool = True,
    overwrite: bool = False,
    nccl_async_error_handling: bool = False,
    restrict_print_to_main_process: bool = False,
    timeout: timedelta | None = None,
) -> None:
    """Initialise the default process group from the environment, and wait until all processes have done so.

    Processes talk through the accelerator's own backend (NCCL on CUDA) for tensors that are there, and through gloo for
    those on the CPU.

    Args:
        set_cuda_current_device: make the accelerator of this process's local rank the current one.
        overwrite: replace variables of the environment that have other values.
        nccl_async_error_handling: let NCCL abort the process when a collective fails or times out.
        restrict_print_to_main_process: replace the builtin `print` by one that is silent elsewhere than on rank 0,
            unless called with `force=True`. For jobs; off by default because it reaches into the whole interpreter.
        timeout: of collectives; torch's default if None.

    Raises:
        RuntimeError: a process group exists already, or a variable of the environment disagrees.
    """
    if is_distributed_enabled():
        raise RuntimeError("a process group exists already; call dinov3.distributed.disable() first")
    before = {name: os.environ.get(name) for name in _EXPORTED}
    environment = TorchDistributedEnvironment()
    environment.export(overwrite=overwrite, nccl_async_error_handling=nccl_async_error_handling)
    _state.environment = before

    if set_cuda_current_device and torch.accelerator.is_available():
        torch.accelerator.set_device_index(_device_index(environment))
    device = default_device()
    arguments: dict[str, Any] = {"timeout": timeout} if timeout is not None else {}
    if device.type == "cuda" and set_cuda_current_device:  # of all back ends only NCCL can be told its device
        arguments["device_id"] = device
    if environment.job_type is JobType.MANUAL:
        # Alone: no port to find, to lose to somebody else, or to leave open.
        arguments |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        dist.init_process_group(_backend(device), **arguments)
        dist.barrier()
    except BaseException:
        disable_distributed()
        raise
    logger.info("%s", environment)
    if restrict_print_to_main_process:
        _restrict_print()


def disable_distributed() -> None:
    """Undo `enable_distributed` and `new_subgroups`: groups, `print` and environment. Does nothing if not enabled."""
    if _state.builtin_print is not None:
        builtins.print = _state.builtin_print
    if is_distributed_enabled():
        if get_world_size() > 1:
            # With gloo of torch 2.7, one teardown in four right after a collective waits forever: its thread needs the
            # interpreter lock, which this one holds while it waits for the thread to end.
            time.sleep(0.1)
        dist.destroy_process_group()  # with it all subgroups
    for name, value in _state.environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _state.subgroup, _state.builtin_print, _state.environment = None, None, {}


def _device_index(environment: TorchDistributedEnvironment) -> int:
    count = torch.accelerator.device_count()
    if count == 1:  # also where the launcher shows each process only its own device
        return 0
    if environment.local_rank >= count:
        raise RuntimeError(f"local rank {environment.local_rank} has no accelerator: there are {count} on this node")
    return environment.local_rank


def _backend(device: torch.device) -> str:
    own = "gloo" if device.type == "cpu" else dist.get_default_backend_for_device(device)
    return "gloo" if own == "gloo" else f"cpu:gloo,{device.type}:{own}"


def _restrict_print() -> None:
    original = _state.builtin_print = builtins.print
    main = is_main_process()

    def print_in_main_process(*args: Any, force: bool = False, **kwargs: Any) -> None:
        if main or force:
            original(*args, **kwargs)

    builtins.print = print_in_main_process
