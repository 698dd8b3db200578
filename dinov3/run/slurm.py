"""The SLURM launcher: from the arguments to a job in the queue. submitit writes and submits the batch script."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import submitit

from dinov3.utils.cluster import (
    get_slurm_account,
    get_slurm_executor_parameters,
    get_slurm_partition,
    get_slurm_qos,
    get_user_checkpoint_path,
)

# Time limits after which a job is queued again before it is given up.
MAX_NUM_TIMEOUT = 30
# Between the signal and the end of a job: enough to finish an iteration and write a checkpoint.
SIGNAL_DELAY_S = 120


def get_shared_folder() -> Path:
    """Folder for the folders of jobs: `experiments` in the user's folder, see `dinov3.utils.cluster`."""
    return get_user_checkpoint_path() / "experiments"


def executor_parameters(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """What a `submitit.AutoExecutor` is told. Options that nobody has set are left to the cluster.

    Args:
        args: the flags of `dinov3.run.submit`.
        name: of the job.
    """
    optional = {
        "slurm_partition": args.slurm_partition or get_slurm_partition(),
        "slurm_qos": args.slurm_qos or get_slurm_qos(),
        "slurm_account": args.slurm_account or get_slurm_account(),
        "slurm_comment": args.comment,
        "slurm_exclude": args.exclude,
    }
    return get_slurm_executor_parameters(
        nodes=args.nodes,
        num_gpus_per_node=int(args.ngpus),
        name=name,
        timeout_min=args.timeout,
        slurm_signal_delay_s=SIGNAL_DELAY_S,
        slurm_array_parallelism=args.slurm_array_parallelism,
        # One task that fails ends the others, which would wait for it in a collective.
        slurm_srun_args=["--kill-on-bad-exit=1"],
        # Sites may have switched requeueing off for jobs that don't ask for it.
        slurm_additional_parameters={"nice": args.slurm_nice, "requeue": True},
        **{key: value for key, value in optional.items() if value},
    )


def submit_jobs(
    class_to_submit: Callable[[], Any],
    output_dir: str | os.PathLike[str],
    submitit_args: argparse.Namespace,
    name: str = "fairvit",
) -> Any:
    """Put a job into the queue, and return it (a `submitit.Job`).

    Args:
        class_to_submit: what each task calls; with a method `checkpoint` the job is queued again after a preemption
            or time limit.
        output_dir: for the batch script and the output of the tasks; `%j` stands for the job's number. Empty: a
            folder per job in `get_shared_folder()`.
        submitit_args: the flags of `get_submitit_parser`.
        name: of the job.

    Raises:
        RuntimeError: SLURM isn't there, or refused the job.
    """
    folder = os.fspath(output_dir or get_shared_folder() / "%j")
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=MAX_NUM_TIMEOUT)
    executor.update_parameters(**executor_parameters(submitit_args, name))
    try:
        return executor.submit(class_to_submit)
    except submitit.core.utils.FailedJobError as error:
        reason = str(error).strip()
        raise RuntimeError(f"SLURM did not take the job: {reason}\nTo run on this machine: --cluster local") from error
