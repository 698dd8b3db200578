"""The context that a job runs in: output folder, log, process group, seeds."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

from dinov3.configs import exit_job, setup_job


@contextlib.contextmanager
def job_context(
    output_dir: str | os.PathLike[str] | None = None,
    distributed_enabled: bool = True,
    logging_enabled: bool = True,
    seed: int | None = 0,
    restrict_print_to_main_process: bool = True,
    distributed_timeout: timedelta | None = None,
) -> Iterator[None]:
    """`setup_job` on entry, `exit_job` at the end, also after an error. Arguments as in `setup_job`."""
    setup_job(
        output_dir=output_dir,
        distributed_enabled=distributed_enabled,
        logging_enabled=logging_enabled,
        seed=seed,
        restrict_print_to_main_process=restrict_print_to_main_process,
        distributed_timeout=distributed_timeout,
    )
    try:
        yield
    finally:
        exit_job(distributed_enabled=distributed_enabled, logging_enabled=logging_enabled)
