"""Site settings of a SLURM cluster, from the environment; None means that an option is not passed on.

| variable | meaning |
| --- | --- |
| `DINOV3_CLUSTER` | a named site (`cw`), whose settings are the defaults of the others |
| `DINOV3_SLURM_ACCOUNT`, `DINOV3_SLURM_QOS`, `DINOV3_SLURM_PARTITION` | given to `sbatch` |
| `DINOV3_CHECKPOINT_PATH` | folder that holds one folder per user |
"""

import getpass
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any


class ClusterType(Enum):
    """Sites whose settings are known by name."""

    CW = "cw"


@dataclass(frozen=True)
class _Site:
    account: str | None = None
    qos: str | None = None
    partition: str | None = None
    checkpoint_path: str | None = None
    cpus_per_task: int = 10


_SITES = {
    None: _Site(),
    # The site where the published models were trained; these values are part of the published interface.
    ClusterType.CW: _Site("fair_amaia_cw_explore", "explore", "learn", "/", cpus_per_task=16),
}


def get_cluster_type(cluster_type: ClusterType | str | None = None) -> ClusterType | None:
    """`cluster_type` itself, else what `DINOV3_CLUSTER` names, else None: an unnamed site."""
    name = cluster_type or os.environ.get("DINOV3_CLUSTER") or None
    return None if name is None else ClusterType(name)


def get_slurm_account(cluster_type: ClusterType | None = None) -> str | None:
    """Account that jobs are billed to."""
    return os.environ.get("DINOV3_SLURM_ACCOUNT") or _site(cluster_type).account


def get_slurm_qos(cluster_type: ClusterType | None = None) -> str | None:
    """Quality of service that jobs ask for."""
    return os.environ.get("DINOV3_SLURM_QOS") or _site(cluster_type).qos


def get_slurm_partition(cluster_type: ClusterType | None = None) -> str | None:
    """Partition that jobs run in."""
    return os.environ.get("DINOV3_SLURM_PARTITION") or _site(cluster_type).partition


def get_checkpoint_path(cluster_type: ClusterType | None = None) -> Path | None:
    """Folder with one folder per user."""
    path = os.environ.get("DINOV3_CHECKPOINT_PATH") or _site(cluster_type).checkpoint_path
    return None if path is None else Path(path)


def get_user_checkpoint_path(cluster_type: ClusterType | None = None) -> Path:
    """The user's folder below `get_checkpoint_path()`; the home directory if there is no such path."""
    path = get_checkpoint_path(cluster_type)
    return Path.home() if path is None else path / (os.environ.get("USER") or getpass.getuser())


def get_slurm_executor_parameters(
    nodes: int, num_gpus_per_node: int, cluster_type: ClusterType | None = None, **overrides: Any
) -> dict[str, Any]:
    """Parameters of a submitit executor: one task per GPU, all memory of the node, then `overrides`."""
    parameters: dict[str, Any] = {
        "mem_gb": 0,  # SLURM reads 0 as all memory of the node
        "gpus_per_node": num_gpus_per_node,
        "tasks_per_node": num_gpus_per_node,
        "cpus_per_task": _site(cluster_type).cpus_per_task,
        "nodes": nodes,
        "slurm_partition": get_slurm_partition(cluster_type),
    }
    if parameters["slurm_partition"] is None:
        del parameters["slurm_partition"]
    return parameters | overrides


def _site(cluster_type: ClusterType | None) -> _Site:
    return _SITES[get_cluster_type(cluster_type)]
