"""Checkpoint directories: which there are, which can be loaded, and how they come and go without half-states.

A checkpoint is a folder whose name is the index of the last finished iteration. It is written under a temporary name
and renamed when complete; folders that are on their way in or out have names that no checkpoint has:

| name | what it is |
| --- | --- |
| `.saving-<name>` | being written, or left behind by a process that was killed |
| `.replaced-<name>` | the former `<name>`, until the new one is in place |
| `.deleting-<name>` | being deleted |
| `<name>_damaged` | could not be loaded when a run continued from an older one |
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterable
from enum import Enum
from pathlib import Path

from dinov3.checkpointer import files

logger = logging.getLogger("dinov3")

_SAVING, _REPLACED, _DELETING = ".saving-", ".replaced-", ".deleting-"
_INDEX = ".metadata"  # written last by torch.distributed.checkpoint

StrPath = str | os.PathLike[str]


# -- Finding ----------------------------------------------------------------------------------------------------------


def find_all_checkpoints(ckpt_dir: StrPath) -> list[Path]:
    """The sub-directories whose name is an integer, in numeric order; empty if there is no such folder.

    If a process was killed while it replaced a checkpoint, the former one stands in for it.
    """
    folder = Path(ckpt_dir)
    if not folder.is_dir():
        return []
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):  # `.replaced-<n>` comes before `<n>`, which then takes its place
        name = path.name.removeprefix(_REPLACED)
        if path.is_dir() and name.isascii() and name.isdigit():
            found[int(name)] = path
    return [found[number] for number in sorted(found)]


def find_latest_checkpoint(ckpt_dir: StrPath) -> Path | None:
    """The checkpoint with the highest number that isn't unfinished or damaged; None if there is none.

    Those that are skipped are named in a warning, with what is wrong with them.
    """
    for path in reversed(find_all_checkpoints(ckpt_dir)):
        problem = checkpoint_problem(path)
        if problem is None:
            return path
        logger.warning("skipping the checkpoint %s: %s", path, problem)
    return None


def checkpoint_problem(path: Path) -> str | None:
    """Why a checkpoint folder can't be loaded (it is unfinished, or files are missing or cut off); None if it can."""
    entries = [entry.name for entry in path.iterdir()]
    if not entries:
        return "it is empty"
    if _INDEX not in entries:
        unfinished = any(name.endswith(".distcp") or name.startswith(_INDEX) for name in entries)
        return "it has no .metadata: saving was not finished" if unfinished else None
    try:
        stored = files.read_dcp_metadata(path).storage_data.values()
    except ValueError as error:
        return str(error)
    needed: dict[str, int] = {}
    for part in stored:
        needed[part.relative_path] = max(needed.get(part.relative_path, 0), part.offset + part.length)
    for name, size in sorted(needed.items()):
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size < size:
            return f"{name} is cut off: it has {file.stat().st_size:,} bytes of {size:,}"
    return None


def set_aside_damaged(ckpt_dir: StrPath, used: Path | None) -> None:
    """Rename the checkpoints that come after the one that is used, which can't be loaded: they no longer count.

    Otherwise they would be among the newest, and `keep_last_n_checkpoints` would delete better ones.
    """
    found = find_all_checkpoints(ckpt_dir)
    for path in found[found.index(used) + 1 if used is not None else 0 :]:
        aside = path.with_name(f"{path.name.removeprefix(_REPLACED)}_damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        logger.warning("the damaged checkpoint %s is now %s", path, aside.name)


# -- Writing ----------------------------------------------------------------------------------------------------------


def begin_saving(target: Path) -> Path:
    """An empty folder beside `target` to write into; also removes what killed processes left beside it.

    Raises:
        OSError: the folder can't be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    clean_up_after_the_killed(target.parent)
    temporary = target.with_name(_SAVING + target.name)
    temporary.mkdir()
    return temporary


def finish_saving(temporary: Path, target: Path) -> None:
    """Put what was written in the place of `target`. At any moment the old or the new one is there, complete."""
    sync_folder(temporary)
    replaced = target.with_name(_REPLACED + target.name)
    with contextlib.suppress(FileNotFoundError):
        target.rename(replaced)
    temporary.rename(target)
    sync_folder(target.parent)
    if replaced.exists():
        _delete(replaced)


def abandon_saving(temporary: Path) -> None:
    """Remove what was written so far."""
    shutil.rmtree(temporary, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (their content is synchronised where it is written)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clean_up_after_the_killed(folder: Path) -> None:
    """Remove what is unfinished, and restore a checkpoint that was being replaced."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(_REPLACED) and not (original := path.with_name(path.name[len(_REPLACED) :])).exists():
            logger.warning("%s was being replaced when its process ended: restoring it", original)
            path.rename(original)
        elif path.name.startswith((_SAVING, _REPLACED, _DELETING)):
            logger.warning("removing %s, which a process that was killed left behind", path)
            shutil.rmtree(path)


# -- Keeping and deleting ---------------------------------------------------------------------------------------------


def keep_last_n_checkpoints(ckpt_dir: StrPath, n: int | None) -> None:
    """Delete all checkpoints but the `n` with the highest numbers; None keeps all. Failures are logged, not raised.

    Raises:
        ValueError: `n` is negative.
    """
    if n is None:
        return
    if n < 0:
        raise ValueError(f"the number of checkpoints to keep must not be negative, got {n}")
    checkpoints = find_all_checkpoints(ckpt_dir)
    _delete_all(checkpoints[: max(len(checkpoints) - n, 0)])


def keep_checkpoint_copy(src: StrPath) -> None:
    """Make `<src>_keep` beside `src`, replacing an older one. Files are hard links where the file system has them."""
    source = Path(src)
    target = source.with_name(source.name + "_keep")
    temporary = target.with_name(_SAVING + target.name)
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=link_or_copy)
    finish_saving(temporary, target)


def link_or_copy(source: StrPath, target: StrPath) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class CheckpointRetentionPolicy(Enum):
    """Which checkpoints of an evaluation's training remain afterwards."""

    ALL = "all"
    BEST = "best"
    LAST = "last"
    LAST_AND_BEST = "last_and_best"
    NONE = "none"

    @property
    def keep_filters(self) -> set[str]:
        """Names of the sub-directories that remain (where not all do)."""
        filters = {"LAST": {"final"}, "BEST": {"best"}, "LAST_AND_BEST": {"final", "best"}}
        return filters.get(self.name, set())

    @property
    def max_to_keep(self) -> int | None:
        """How many numbered checkpoints to keep while training; None: all."""
        return None if self is CheckpointRetentionPolicy.ALL else 1


def cleanup_checkpoint(ckpt_dir: StrPath, checkpoint_retention_policy: CheckpointRetentionPolicy) -> None:
    """Delete the sub-directories that the policy doesn't keep. Failures are logged, not raised."""
    folder = Path(ckpt_dir)
    if checkpoint_retention_policy is CheckpointRetentionPolicy.ALL or not folder.is_dir():
        return
    kept = checkpoint_retention_policy.keep_filters
    _delete_all(path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in kept)


def _delete_all(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            _delete(path)
            logger.info("deleted the checkpoint %s", path)
        except OSError as error:
            logger.warning("could not delete the checkpoint %s: %s", path, error)


def _delete(path: Path) -> None:
    # Renamed first: a process that is killed on the way leaves no checkpoint with half of its files.
    doomed = path.with_name(_DELETING + path.name)
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)
