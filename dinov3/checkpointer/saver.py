"""Saving the checkpoints of a run beside the run itself, which goes on after a copy of the state has been made."""

import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dinov3 import distributed
from dinov3.checkpointer.checkpointer import SavedState, in_main_process, state_to_save, write_checkpoint
from dinov3.checkpointer.dcp import CheckpointError

logger = logging.getLogger("dinov3")


class CheckpointSaver:
    """Saves one checkpoint at a time, in a thread.

    A save that fails leaves the former checkpoints as they are, and is an error in the log. Too many in a row raise it.

        with CheckpointSaver() as saver:
            for ...:
                saver.save(...)

    Args:
        process_group: the processes over which the model is sharded; default: the world. All of them make this object,
            and call its methods in the same order.
        in_background: False: return from `save` when the checkpoint is there.
        patience: failures in a row that are only logged.

    Attributes:
        newest: the checkpoint that was saved last.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | None = None, *, in_background: bool = True, patience: int = 2
    ) -> None:
        self._group = process_group
        world = distributed.get_default_process_group()
        if in_background and world is not None:
            # Its own: collectives of the thread would mix with those of the training.
            ranks = dist.get_process_group_ranks(process_group or world)
            own = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
            assert isinstance(own, dist.ProcessGroup), "this process is one of its ranks"
            self._group = own
        self._in_background = in_background
        self._patience = patience
        self._failures = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.newest: Path | None = None

    def save(
        self,
        ckpt_dir: str | os.PathLike[str],
        *,
        iteration: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        then: Callable[[Path], Any] | None = None,
        **others: Any,
    ) -> None:
        """Begin to save what the state is now, as `save_checkpoint` does, after the save before has ended.

        Args:
            ckpt_dir: the checkpoint's own folder.
            iteration: index of the last finished iteration.
            model: any module, sharded or not.
            optimizer: its optimizer.
            then: called in the main process with the folder when it is in its place.
            others: as in `save_checkpoint`.

        Raises:
            CheckpointError: this save, or the one before, is one failure too many.
        """
        self.wait()
        state = state_to_save(iteration, model, optimizer, **others)
        if not self._in_background:
            self._write(Path(ckpt_dir), state, then)
            self.wait()
            return
        self._thread = threading.Thread(
            target=self._write, args=(Path(ckpt_dir), state.copy_to_cpu(), then), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being saved any more.

        Raises:
            CheckpointError: the save failed, and too many did before.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is None:
            return
        if not isinstance(error, CheckpointError):
            raise error
        self._failures += 1
        if self._failures > self._patience:
            raise CheckpointError(f"{error} ({self._failures} failures in a row)") from error
        logger.error("%s; older checkpoints are untouched, and the run goes on", error)

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait, after an error too: what is being saved is from before it. Not if somebody wants to leave at once."""
        if error is None:
            self.wait()
        elif isinstance(error, Exception):
            try:
                self.wait()
            except Exception as second:  # the first one says more
                logger.error("%s", second)

    def _write(self, target: Path, state: SavedState, then: Callable[[Path], Any] | None) -> None:
        try:
            write_checkpoint(target, state, process_group=self._group)
            self.newest = target
            if then is not None:
                in_main_process(partial(then, target), self._group, f"after saving the checkpoint {target}")
            self._failures = 0
        except BaseException as error:  # raised again by `wait`, in the main thread
            self._error = error
