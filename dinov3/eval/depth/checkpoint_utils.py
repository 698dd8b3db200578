"""Checkpoints of a depth training: `model_<iterations>.pth` and `model_final.pth` in the output folder.

A file is `{"model": decoder's state dict, "optimizer", "iteration": number of iterations done, "scheduler", "loss"}`;
those of the published code lack the last two.
"""

import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dinov3 import distributed
from dinov3.checkpointer import CheckpointRetentionPolicy
from dinov3.eval.probe import ProbeCheckpoints, Stateful

logger = logging.getLogger("dinov3")

FINAL_FILE = "model_final.pth"
_REGULAR = re.compile(r"model_(\d+)\.pth")
_OPTIONAL = ("scheduler", "loss")


def find_latest_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """`model_final.pth` if it is there, else the `model_<iterations>.pth` with most iterations; None: there is none."""
    folder = Path(output_dir)
    if (folder / FINAL_FILE).is_file():
        return folder / FINAL_FILE
    numbered = {path: int(match[1]) for path in folder.glob("*.pth") if (match := _REGULAR.fullmatch(path.name))}
    return max(numbered, key=numbered.__getitem__, default=None)


class DepthCheckpoints(ProbeCheckpoints):
    """Checkpoints of `train_probe` in the files above; all of them are kept.

    Args:
        output_dir: made when needed.
        state: what is saved, by key.
        fast_forward: called with the number of iterations done when a file has no scheduler.
    """

    def __init__(
        self, output_dir: str | os.PathLike[str], state: Mapping[str, Stateful], fast_forward: Callable[[int], None]
    ) -> None:
        super().__init__(
            output_dir, state, CheckpointRetentionPolicy.ALL, fast_forward=fast_forward, optional=_OPTIONAL
        )

    def resume(self, source: str | os.PathLike[str] | None = None) -> int:
        """Load the newest checkpoint; return the number of iterations that are done.

        Raises:
            ValueError: the file lacks a part, or parts don't fit.
        """
        newest = find_latest_checkpoint(self.folder if source is None else source)
        if newest is None:
            return 0
        saved: dict[str, Any] = torch.load(newest, map_location="cpu", weights_only=True)
        if missing := [key for key in ("iteration", *self.state) if key not in saved and key not in _OPTIONAL]:
            raise ValueError(f"{newest} lacks {', '.join(missing)}; it has {', '.join(map(str, saved))}")
        done = int(saved["iteration"])
        if self.fast_forward is not None and any(key not in saved for key in _OPTIONAL):
            self.fast_forward(done)  # before the others are loaded: it may change them
        for key, part in self.state.items():
            if key in saved:
                part.load_state_dict(saved[key])
        logger.info("resumed %s: %d iterations are done", newest, done)
        return done

    def save(self, name: str, iteration: int) -> None:
        """Write `<name>`; `iteration` is the 0-based index of the last finished one."""
        if not distributed.is_main_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{name}.tmp"
        torch.save(
            {key: part.state_dict() for key, part in self.state.items()} | {"iteration": iteration + 1}, temporary
        )
        temporary.replace(self.folder / name)

    def save_regular(self, iteration: int) -> None:
        """Write `model_<iterations>.pth`."""
        self.save(f"model_{iteration + 1:08d}.pth", iteration)

    def offer_best(self, accuracy: float, iteration: int) -> None:
        """Nothing: the last iterate is what is tested."""

    def finish(self, iteration: int) -> None:
        """Write the file of the last iteration, and `model_final.pth`."""
        self.save_regular(iteration)
        self.save(FINAL_FILE, iteration)

    def is_finished(self) -> bool:
        """Whether `model_final.pth` is there."""
        return (self.folder / FINAL_FILE).exists()

    def clean_up(self) -> None:
        """Nothing is deleted."""
