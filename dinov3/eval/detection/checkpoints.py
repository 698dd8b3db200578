"""Checkpoints of a detector's training: `model_<iterations>.pth` and `model_final.pth` in the output folder.

A file is `{"model": tensors of the head, "optimizer", "scheduler", "iteration": number of iterations done}`; the hub
entry reads it too. Of the numbered ones the newest is kept.
"""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dinov3 import distributed
from dinov3.checkpointer import CheckpointRetentionPolicy
from dinov3.eval.probe import ProbeCheckpoints, Stateful

logger = logging.getLogger("dinov3")

FINAL_FILE = "model_final.pth"
_NUMBERED = re.compile(r"model_(\d+)\.pth")


def numbered_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The files `model_<iterations>.pth` of a folder, by iterations."""
    found = {path: int(m[1]) for path in Path(folder).glob("model_*.pth") if (m := _NUMBERED.fullmatch(path.name))}
    return sorted(found, key=found.__getitem__)


class DetectionCheckpoints(ProbeCheckpoints):
    """Checkpoints of `train_probe` in these files.

    Args:
        output_dir: made when needed.
        state: what is saved, by key.
    """

    def __init__(self, output_dir: str | os.PathLike[str], state: Mapping[str, Stateful]) -> None:
        super().__init__(output_dir, state, CheckpointRetentionPolicy.LAST)

    def resume(self, source: str | os.PathLike[str] | None = None) -> int:
        """Load the newest checkpoint of the folder; return the number of iterations that are done.

        Raises:
            ValueError: the file lacks a part, or parts don't fit.
        """
        final = self.folder / FINAL_FILE
        newest = final if final.is_file() else next(reversed(numbered_checkpoints(self.folder)), None)
        if newest is None:
            return 0
        saved: dict[str, Any] = torch.load(newest, map_location="cpu", weights_only=True)
        if missing := [key for key in ("iteration", *self.state) if key not in saved]:
            raise ValueError(f"{newest} lacks {', '.join(missing)}; it has {', '.join(map(str, saved))}")
        for key, part in self.state.items():
            part.load_state_dict(saved[key])
        logger.info("resumed %s: %d iterations are done", newest, saved["iteration"])
        return int(saved["iteration"])

    def save(self, name: str, iteration: int) -> None:
        """Write the file `<name>`; `iteration` is the 0-based index of the last finished one."""
        if not distributed.is_main_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{name}.tmp"
        states = {key: part.state_dict() for key, part in self.state.items()}
        torch.save({**states, "iteration": iteration + 1}, temporary)
        temporary.replace(self.folder / name)

    def save_regular(self, iteration: int) -> None:
        """Write `model_<iterations>.pth`, and delete those before."""
        self.save(f"model_{iteration + 1:08d}.pth", iteration)
        if distributed.is_main_process():
            for path in numbered_checkpoints(self.folder)[:-1]:
                path.unlink()

    def offer_best(self, accuracy: float, iteration: int) -> None:
        """Nothing: the last iterate is what is published."""

    def finish(self, iteration: int) -> None:
        """Write `model_final.pth`."""
        self.save(FINAL_FILE, iteration)

    def is_finished(self) -> bool:
        """Whether `model_final.pth` is there."""
        return (self.folder / FINAL_FILE).is_file()

    def clean_up(self) -> None:
        """Nothing more is deleted."""
