"""Collectives on tensors, for metrics and features. Without a process group they return what they were given."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3.distributed.torch_distributed_wrapper import get_world_size
from dinov3.utils.device import default_device


def communication_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Where tensors must be for collectives of `group` (default: the world): the CPU wherever that is possible."""
    if not dist.is_initialized() or "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    return default_device()


@torch.no_grad()
def reduce_dict(
    input_dict: Mapping[str, Tensor], average: bool = True, group: dist.ProcessGroup | None = None
) -> Mapping[str, Tensor]:
    """Sum, or average, the tensors of all processes, in one all-reduce.

    Args:
        input_dict: tensors of one shape and device; every process brings the same keys (in any order).
        average: divide by the number of processes.
        group: default: the world.

    Returns:
        The input itself in a world of one; else a dictionary of the same keys, in the same order.
    """
    world_size = get_world_size(group)
    if world_size <= 1 or not input_dict:
        return input_dict
    names = sorted(input_dict)
    values = torch.stack([input_dict[name] for name in names])
    dist.all_reduce(values, group=group)
    if average:
        values = values / world_size
    reduced = dict(zip(names, values, strict=True))
    return {name: reduced[name] for name in input_dict}


@torch.no_grad()
def gather_all_tensors(result: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """The tensors of all processes of `group` (default: the world), in rank order.

    Tensors have the same dtype and number of axes; sizes may differ from process to process. Scalars are allowed.
    No gradient flows.
    """
    world_size = get_world_size(group)
    result = result.detach().contiguous()
    if world_size == 1:
        return [result]
    shapes = _gather_equal(torch.tensor(result.shape, dtype=torch.int64, device=result.device), world_size, group)
    sizes = torch.stack(shapes).tolist() if result.ndim else [[]] * world_size
    largest = [max(axis) for axis in zip(*sizes, strict=True)]
    padded = result.new_zeros(largest)
    padded[tuple(slice(n) for n in result.shape)] = result
    gathered = _gather_equal(padded, world_size, group)
    return [g[tuple(slice(n) for n in size)] for g, size in zip(gathered, sizes, strict=True)]


def _gather_equal(tensor: Tensor, world_size: int, group: Any) -> list[Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(world_size)]
    if tensor.numel():
        dist.all_gather(gathered, tensor, group=group)
    return gathered
