"""Random weights of sharded models: the same for any number of processes, and never the same in two shards."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dinov3 import distributed


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of the module are spread over processes."""
    return any(isinstance(param, DTensor) for param in module.parameters())


@torch.no_grad()
def init_weights(module: nn.Module, build: Callable[[], nn.Module], group: dist.ProcessGroup | None) -> None:
    """Call `module.init_weights()`, or, for a sharded module, give it the weights that this would make in one process.

    The first process of the group makes the whole module in its main memory and scatters it, one tensor at a time.
    Random fills of the shards themselves would repeat: on a CPU mesh equal seeds make equal shards.

    Args:
        module: has `init_weights()`.
        build: makes an unsharded module of the same architecture on the meta device.
        group: the processes over which `module` is sharded.
    """
    if not is_sharded(module):
        module.init_weights()  # type: ignore[operator]
        return
    whole: dict[str, torch.Tensor] = {}
    if distributed.is_main_process(group):
        unsharded = build().to_empty(device="cpu")
        unsharded.init_weights()  # type: ignore[operator]
        whole = unsharded.state_dict()
    for name, tensor in module.state_dict().items():
        device = tensor.device
        full = whole[name].to(device) if whole else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if isinstance(tensor, DTensor):
            tensor.to_local().copy_(distribute_tensor(full, tensor.device_mesh, tensor.placements).to_local())
        else:
            dist.broadcast(full, src=dist.get_global_rank(group, 0) if group else 0, group=group)
            tensor.copy_(full)
