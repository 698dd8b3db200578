"""Environment variables around jobs and compiler caches."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger("dinov3")

# Compiler caches of the submitting process; a job that inherited them would write into somebody else's folder.
_HIDDEN = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


@contextlib.contextmanager
def clean_env() -> Iterator[None]:
    """Hide the variables of SLURM, submitit and the compiler caches, so that a job can submit another.

    Needs submitit; a version without `extra_names` leaves the compiler caches in place and is warned about.
    """
    import submitit

    try:
        context = submitit.helpers.clean_env(extra_names=_HIDDEN)
    except TypeError:
        logger.warning("this version of submitit can't hide %s: update it", " and ".join(_HIDDEN))
        context = submitit.helpers.clean_env()
    with context:
        yield


def set_triton_cache_dir(cache_dir: str | Path | None = None) -> None:
    """Point `TRITON_CACHE_DIR` at `cache_dir`, by default a fresh temporary folder."""
    os.environ["TRITON_CACHE_DIR"] = str(cache_dir or tempfile.mkdtemp(prefix="triton-cache-"))
