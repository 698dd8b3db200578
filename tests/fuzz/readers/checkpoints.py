"""Checkpoints: folders of torch.distributed.checkpoint, as weights and to go on from, and files of heads' trainings."""

import io
import random
import shutil
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from dinov3.checkpointer import CheckpointRetentionPolicy, load_checkpoint, save_checkpoint
from dinov3.checkpointer.directories import find_latest_checkpoint
from dinov3.checkpointer.weights import read_weights
from dinov3.eval.flat_checkpoints import FlatCheckpoints
from dinov3.eval.probe import ProbeCheckpoints
from tests.fuzz.core import Reader, require
from tests.fuzz.mutations import Damaged, damage
from tests.fuzz.readers.weights import check_tensors


class Folders(Reader):
    """`find_latest_checkpoint` with `load_checkpoint`, and `read_weights`, over a damaged folder."""

    name, share = "checkpoint folders", 3.0
    errors: ClassVar[tuple[type[Exception], ...]] = (ValueError, RuntimeError, FileNotFoundError)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        torch.manual_seed(3)
        self.model = nn.Module()
        self.model.add_module("teacher", nn.ModuleDict({"backbone": nn.Linear(5, 4)}))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.model.teacher["backbone"](torch.ones(2, 5)).sum().backward()
        self.optimizer.step()
        self.wanted = {key: value.clone() for key, value in self.model.state_dict().items()}
        save_checkpoint(folder / "made" / "7", iteration=7, model=self.model, optimizer=self.optimizer)
        self.content = {path.name: path.read_bytes() for path in sorted((folder / "made" / "7").iterdir())}

    def make(self, rng: random.Random) -> tuple[bool, str, Damaged]:
        name = rng.choice(sorted(self.content))
        how = damage(rng, self.content[name])
        shutil.rmtree(self.folder / "found", ignore_errors=True)
        for other, data in self.content.items():
            self.file(f"found/7/{other}", how.data if other == name else data)
        return rng.random() < 0.5, name, how

    def read(self, given: tuple[bool, str, Damaged]) -> dict[str, Tensor]:
        folder = self.folder / "found" / "7"
        if given[0]:
            return {f"teacher.backbone.{key}": value for key, value in read_weights(folder).items()}
        newest = find_latest_checkpoint(folder.parent)
        if newest is None:  # a warning has said why
            raise ValueError(f"{folder} is damaged")
        with torch.no_grad():
            for value in self.model.state_dict().values():
                value.fill_(7)
        iteration = load_checkpoint(newest, model=self.model, optimizer=self.optimizer)
        require(iteration == 7 or given[2].n_changed, f"iteration {iteration}")
        return self.model.state_dict()

    def check(self, given: tuple[bool, str, Damaged], result: dict[str, Tensor]) -> None:
        _, name, how = given
        # Neither the index nor the small archives that hold one tensor each say what their bytes should be.
        if how.kind != "overwritten" or not name.startswith("."):
            require(result.keys() == self.wanted.keys(), f"other tensors: {sorted(result)}")
        if how.kind in ("none", "cut"):
            check_tensors(self.wanted, result, how)

    def must_name(self, given: tuple[bool, str, Damaged]) -> str:
        return "found/7"


class HeadTrainings(Reader):
    """`FlatCheckpoints` and `ProbeCheckpoints`: what a head's training goes on from."""

    name, share = "head checkpoints", 3.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        torch.manual_seed(4)
        self.head = nn.Linear(4, 3)
        self.wanted = {key: value.clone() for key, value in self.head.state_dict().items()}
        buffer = io.BytesIO()
        torch.save({"model": self.wanted, "iteration": 12, "best_accuracy": 0.5}, buffer)
        self.content = buffer.getvalue()

    def make(self, rng: random.Random) -> tuple[bool, Path, Damaged]:
        how, flat = damage(rng, self.content), rng.random() < 0.5
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        return flat, self.file("run/model_00000012.pth" if flat else "run/12/checkpoint.pth", how.data), how

    def read(self, given: tuple[bool, Path, Damaged]) -> int:
        kind = FlatCheckpoints if given[0] else ProbeCheckpoints
        with torch.no_grad():
            for value in self.head.state_dict().values():
                value.fill_(7)
        return kind(self.folder / "run", {"model": self.head}, CheckpointRetentionPolicy.ALL).resume()

    def check(self, given: tuple[bool, Path, Damaged], result: int) -> None:
        require(result == (12 if given[0] else 13), f"{result} iterations are done")
        check_tensors(self.wanted, self.head.state_dict(), given[2])

    def must_name(self, given: tuple[bool, Path, Damaged]) -> str:
        return given[1].name
