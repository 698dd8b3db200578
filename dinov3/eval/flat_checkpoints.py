"""Checkpoints of dense heads, as files in the output folder: `model_<iterations>.pth` and `model_final.pth`.

A file is `{<key>: state of that part, ..., "iteration": number of iterations done}`; the hub reads the final ones too.
"""

import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from dinov3 import distributed
from dinov3.checkpointer import CheckpointRetentionPolicy
from dinov3.eval.probe import ProbeCheckpoints, Stateful, read_parts
from dinov3.utils.files import atomically

logger = logging.getLogger("dinov3")

FINAL_FILE = "model_final.pth"
_NUMBERED = re.compile(r"model_(\d+)\.pth")


def numbered_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The files `model_<iterations>.pth` of a folder, by iterations."""
    found = {path: int(m[1]) for path in Path(folder).glob("model_*.pth") if (m := _NUMBERED.fullmatch(path.name))}
    return sorted(found, key=found.__getitem__)


def find_latest_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """`model_final.pth` if it is there, else the `model_<iterations>.pth` with most iterations; None: there is none."""
    final = Path(output_dir, FINAL_FILE)
    return final if final.is_file() else next(reversed(numbered_checkpoints(output_dir)), None)


class FlatCheckpoints(ProbeCheckpoints):
    """Checkpoints of `train_probe` in these files; the last iterate is what is published, so there is no `best`.

    Args:
        output_dir: made when needed.
        state: what is saved, by key.
        policy: `ALL` numbered files remain, or the `LAST`.
        fast_forward: called with the number of iterations done when a file lacks a key of `optional`.
        optional: keys that files of the published code lack.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        state: Mapping[str, Stateful],
        policy: CheckpointRetentionPolicy,
        *,
        fast_forward: Callable[[int], None] | None = None,
        optional: tuple[str, ...] = (),
    ) -> None:
        super().__init__(output_dir, state, policy, fast_forward=fast_forward, optional=optional)

    def resume(self, source: str | os.PathLike[str] | None = None) -> int:
        """Load the newest checkpoint; return the number of iterations that are done.

        Raises:
            ValueError: the file lacks a part, or parts don't fit.
        """
        newest = find_latest_checkpoint(self.folder if source is None else source)
        if newest is None:
            return 0
        saved = read_parts(newest)
        if missing := [key for key in ("iteration", *self.state) if key not in saved and key not in self.optional]:
            raise ValueError(f"{newest} lacks {', '.join(missing)}; it has {', '.join(map(str, saved))}")
        done = int(saved["iteration"])
        self.load(saved, done)
        logger.info("resumed %s: %d iterations are done", newest, done)
        return done

    def save(self, name: str, iteration: int) -> None:
        """Write the file `<name>`; `iteration` is the 0-based index of the last finished one."""
        if not distributed.is_main_process():
            return
        states = {key: part.state_dict() for key, part in self.state.items()}
        with atomically(self.folder / name) as file:
            torch.save({**states, "iteration": iteration + 1}, file)

    def save_regular(self, iteration: int) -> None:
        """Write `model_<iterations>.pth`, and delete those before unless all are kept."""
        self.save(f"model_{iteration + 1:08d}.pth", iteration)
        if self.policy is not CheckpointRetentionPolicy.ALL and distributed.is_main_process():
            for path in numbered_checkpoints(self.folder)[:-1]:
                path.unlink()

    def offer_best(self, accuracy: float, iteration: int) -> None:
        """Nothing."""

    def finish(self, iteration: int) -> None:
        """Write `model_final.pth`, and the numbered file of the last iteration if all are kept."""
        if self.policy is CheckpointRetentionPolicy.ALL:
            self.save_regular(iteration)
        self.save(FINAL_FILE, iteration)

    def is_finished(self) -> bool:
        """Whether `model_final.pth` is there."""
        return (self.folder / FINAL_FILE).is_file()

    def clean_up(self) -> None:
        """Nothing more is deleted."""
