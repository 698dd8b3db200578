"""What each process of a launched job does: set up the log, load the script, call it."""

import logging
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinov3.distributed.stopping import Stopped

logger = logging.getLogger("dinov3")

# How long processes that have saved their state wait to be ended by SLURM: grace times of preemptions are shorter.
_END_WAIT_S = 600.0


class CheckpointableSubmitter:
    """A call of a script's function, that submitit can pickle, run, and run again after a preemption.

    The script resumes from what it left in its output folder, so queueing the same call again is all that is needed.

    Args:
        module_path: Python file.
        callable_name: function in it, called with the list of arguments.
        args: those arguments. `--output-dir=<output_dir>` is put in front unless they have an `--output-dir` already.
        output_dir: folder of the job; `%j` stands for the job's number, known once it runs.
    """

    def __init__(
        self,
        module_path: str | os.PathLike[str],
        callable_name: str,
        args: Sequence[str],
        output_dir: str | os.PathLike[str],
    ) -> None:
        self.module_path = os.fspath(module_path)
        self.callable_name = callable_name
        self.args = list(args)
        self.output_dir = os.fspath(output_dir)

    def __call__(self) -> Any:
        """Run the script in this process, and return what its function returns.

        Raises:
            Stopped: a preemption or time limit came, the script has saved its state, and the job is queued again where
                that is possible.
        """
        from dinov3.distributed.stopping import Stopped
        from dinov3.utils.custom_callable import load_custom_callable

        self.output_dir = self._resolved_output_dir()
        Path(self.output_dir).mkdir(parents=True, exist_ok=True)
        self._setup_logging()
        logger.info("%s:%s with arguments %s", self.module_path, self.callable_name, self.script_args())
        try:
            return load_custom_callable(self.module_path, self.callable_name)(self.script_args())
        except Stopped as stopped:
            if _in_slurm_job():
                _leave_the_end_to_slurm(stopped)
            raise
        except Exception:
            self._setup_logging()  # the script has closed its log on the way out
            logger.critical("%s failed", Path(self.module_path).name, exc_info=True)
            raise

    def checkpoint(self) -> Any:
        """The call to run when the job is queued again: the same, with the folder that this job has."""
        import submitit

        resumed = CheckpointableSubmitter(self.module_path, self.callable_name, self.args, self._resolved_output_dir())
        return submitit.helpers.DelayedSubmission(resumed)

    def script_args(self) -> list[str]:
        """What the function is called with."""
        if any(arg == "--output-dir" or arg.startswith("--output-dir=") for arg in self.args):
            return self.args
        return [f"--output-dir={self.output_dir}", *self.args]

    def _resolved_output_dir(self) -> str:
        if "%j" not in self.output_dir:
            return self.output_dir
        import submitit

        return self.output_dir.replace("%j", str(submitit.JobEnvironment().job_id))

    def _setup_logging(self) -> None:
        from dinov3.logging import setup_logging

        # As in `setup_job`: a script that calls it adds no second handler.
        setup_logging(output=self.output_dir, level=logging.INFO)


def _in_slurm_job() -> bool:
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def _leave_the_end_to_slurm(stopped: "Stopped") -> None:
    """Wait for what SLURM does with a job that has saved its state.

    After a preemption signal, submitit's handler, which is in place again, asks SLURM to queue the job again; that ends
    the process. After a SIGTERM this may be a preemption too, and the signal for it still to come: a process that left
    by itself would be a failed job, one that waits is queued again or cancelled, as SLURM has decided.
    """
    if stopped.preempted:
        signal.raise_signal(stopped.signum)  # doesn't return in rank 0
    if stopped.signum != signal.SIGINT:
        time.sleep(_END_WAIT_S)
