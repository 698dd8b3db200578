"""Process groups: who am I, who else is there, and the few collectives that the package needs.

`environment.py` finds out how the process was launched, `torch_distributed_wrapper.py` creates and destroys groups,
`torch_distributed_primitives.py` moves tensors. Everything answers without a process group too: rank 0 of 1.
"""

from dinov3.distributed.environment import JobType, TorchDistributedEnvironment
from dinov3.distributed.torch_distributed_primitives import gather_all_tensors, reduce_dict
from dinov3.distributed.torch_distributed_wrapper import (
    disable_distributed,
    enable_distributed,
    get_default_process_group,
    get_process_subgroup,
    get_rank,
    get_subgroup_rank,
    get_subgroup_size,
    get_world_size,
    is_distributed_enabled,
    is_main_process,
    is_subgroup_main_process,
    new_subgroups,
    save_in_main_process,
)

enable = enable_distributed
disable = disable_distributed
is_enabled = is_distributed_enabled

__all__ = [
    "JobType",
    "TorchDistributedEnvironment",
    "disable",
    "enable",
    "gather_all_tensors",
    "get_default_process_group",
    "get_process_subgroup",
    "get_rank",
    "get_subgroup_rank",
    "get_subgroup_size",
    "get_world_size",
    "is_enabled",
    "is_main_process",
    "is_subgroup_main_process",
    "new_subgroups",
    "reduce_dict",
    "save_in_main_process",
]
