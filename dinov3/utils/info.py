"""Facts about the running code, for log files."""

import os
import subprocess
from pathlib import Path


def get_sha() -> str:
    """`"sha: <sha>, status: <clean|has uncommited changes>, branch: <branch>"` of this source tree.

    Each part is `N/A` outside a git repository or without git. Never raises.
    """
    sha, changes, branch = (
        _git("rev-parse", "HEAD"),
        _git("diff-index", "HEAD"),
        _git("rev-parse", "--abbrev-ref", "HEAD"),
    )
    status = None if changes is None else "has uncommited changes" if changes else "clean"
    return f"sha: {sha or 'N/A'}, status: {status or 'N/A'}, branch: {branch or 'N/A'}"


def get_conda_env() -> tuple[str | None, str | None]:
    """Name and folder of the active conda environment, each None if there is none."""
    return os.environ.get("CONDA_DEFAULT_ENV"), os.environ.get("CONDA_PREFIX")


def _git(*arguments: str) -> str | None:
    """Output of a git command run beside this file; None if it fails or there is no git."""
    try:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
