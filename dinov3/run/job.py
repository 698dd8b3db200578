"""What each process of a launched job does: set up the log, load the script, call it."""

import logging
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger("dinov3")

# How long processes other than the first wait to be ended by SLURM when their job is queued again.
_REQUEUE_WAIT_S = 120.0


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
            if stopped.preempted and _in_slurm_job():
                self._queue_again(stopped.signum)
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

    def _queue_again(self, signum: int) -> None:
        """Hand the signal on to submitit: its handler, in place again, asks SLURM in rank 0 to queue the job again."""
        signal.raise_signal(signum)  # doesn't return in rank 0
        time.sleep(_REQUEUE_WAIT_S)


def _in_slurm_job() -> bool:
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
