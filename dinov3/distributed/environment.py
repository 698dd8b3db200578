"""How this process was launched (torchrun, SLURM or by hand), read from its environment variables."""

import os
import random
import socket
import subprocess
from enum import Enum


class JobType(Enum):
    """What started this process."""

    TORCH_ELASTIC = "TorchElastic"
    SLURM = "Slurm"
    MANUAL = "manual"


class TorchDistributedEnvironment:
    """Rendezvous address and ranks of this process.

    The first match wins: torchrun (`TORCHELASTIC_RUN_ID`), SLURM (`SLURM_JOB_ID`), otherwise a job of one process.

    Attributes:
        job_type: what started the process.
        job_id: torchrun's run id (string), SLURM's job id (int), or None.
        master_addr, master_port: where the processes meet.
        rank, world_size: of all processes of the job.
        local_rank, local_world_size: of the processes of this node.

    Raises:
        RuntimeError: a variable that the launcher should have set is missing, or SLURM's node list can't be expanded.
    """

    def __init__(self) -> None:
        self.job_id: str | int | None = None
        if "TORCHELASTIC_RUN_ID" in os.environ:
            self._read_torch_elastic()
        elif "SLURM_JOB_ID" in os.environ:
            self._read_slurm()
        else:
            self.job_type = JobType.MANUAL
            self.master_addr, self.master_port = "127.0.0.1", _free_port()
            self.rank, self.world_size = 0, 1
            self.local_rank, self.local_world_size = 0, 1

    def _read_torch_elastic(self) -> None:
        self.job_type, self.job_id = JobType.TORCH_ELASTIC, os.environ["TORCHELASTIC_RUN_ID"]
        self.master_addr, self.master_port = _variable("MASTER_ADDR"), int(_variable("MASTER_PORT"))
        self.rank, self.world_size = int(_variable("RANK")), int(_variable("WORLD_SIZE"))
        self.local_rank, self.local_world_size = int(_variable("LOCAL_RANK")), int(_variable("LOCAL_WORLD_SIZE"))

    def _read_slurm(self) -> None:
        job_id = int(_variable("SLURM_JOB_ID"))
        self.job_type, self.job_id = JobType.SLURM, job_id
        n_nodes = int(_variable("SLURM_JOB_NUM_NODES"))
        nodes = _expand_node_list(_variable("SLURM_JOB_NODELIST"))
        if len(nodes) != n_nodes:
            raise RuntimeError(
                f"SLURM_JOB_NODELIST names {len(nodes)} nodes {nodes}, but SLURM_JOB_NUM_NODES is {n_nodes}"
            )
        self.master_addr = nodes[0]
        port = os.environ.get("MASTER_PORT")
        # Seeded with the job id: all processes of the job agree on the port without talking to each other.
        self.master_port = int(port) if port else random.Random(job_id).randint(20_000, 60_000)
        self.rank, self.world_size = int(_variable("SLURM_PROCID")), int(_variable("SLURM_NTASKS"))
        self.local_rank, self.local_world_size = int(_variable("SLURM_LOCALID")), self.world_size // n_nodes

    def __str__(self) -> str:
        job = f"{self.job_type.value} job" + (f" ({self.job_id})" if self.job_id else "")
        return f"{job} using {self.master_addr}:{self.master_port} (rank={self.rank}, world size={self.world_size})"

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def export(self, *, overwrite: bool, nccl_async_error_handling: bool = False) -> "TorchDistributedEnvironment":
        """Write the variables that `torch.distributed` reads, and return this object.

        Args:
            overwrite: replace variables that are set to another value.
            nccl_async_error_handling: let NCCL abort the process when a collective fails or times out.

        Raises:
            RuntimeError: a variable has another value already, and `overwrite` is False.
        """
        variables = {
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
        }
        if nccl_async_error_handling:
            variables["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"
        if not overwrite:
            for name, value in variables.items():
                if os.environ.get(name, value) != value:
                    raise RuntimeError(
                        f"{name} is set to {os.environ[name]!r}, but this {self.job_type.value} job needs {value!r}: "
                        f"unset it, or export with overwrite=True"
                    )
        os.environ.update(variables)
        return self


def launch_rank() -> int:
    """Rank that the launcher gave this process, known before any process group exists; 0 without a launcher."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ.get("RANK", "0"))
    if "SLURM_JOB_ID" in os.environ:
        return int(os.environ.get("SLURM_PROCID", "0"))
    return 0


def _variable(name: str) -> str:
    try:
        return os.environ[name]
    except KeyError:
        raise RuntimeError(f"environment variable {name} is not set, although a launcher should have set it") from None


def _expand_node_list(node_list: str) -> list[str]:
    """Host names of a SLURM node list such as `node[1-3]`."""
    command = ["scontrol", "show", "hostnames", node_list]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise RuntimeError("this is a SLURM job (SLURM_JOB_ID is set), but there is no `scontrol` on PATH") from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"`{' '.join(command)}` failed: {error.stderr.strip()}") from error
    return done.stdout.split()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        port: int = sock.getsockname()[1]
        return port
