"""What every metric is: numbers that are collected batch by batch and merged over processes when they are read."""

from abc import ABC, abstractmethod
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3.distributed import gather_all_tensors, get_world_size


class Metric(ABC):
    """Base of the metrics: states that sum over batches, and over processes.

    A subclass names its states with their start values and annotates them; `update` adds to the attributes of these
    names, `compute` makes the numbers out of `merged`. `compute` is a collective: every process of the world must call
    it, and every process gets the same answer.

    Attributes:
        synchronized: set to False, this process counts for itself: `compute` is no collective then.
    """

    def __init__(self, **states: Tensor) -> None:
        self._start = states
        self.synchronized = True
        self.device = torch.device("cpu")
        self.reset()

    def reset(self) -> None:
        """Forget everything collected so far."""
        for name, start in self._start.items():
            setattr(self, name, start.clone().to(self.device))

    def to(self, device: torch.device | str) -> Self:
        """Move the states; return this metric."""
        self.device = torch.device(device)
        for name in self._start:
            setattr(self, name, getattr(self, name).to(self.device))
        return self

    @abstractmethod
    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch: scores `[B, C]` and their targets `[B]` or `[B, ...]`."""

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """The numbers over all samples of all processes so far, by key."""

    def merged(self, *names: str) -> list[Tensor]:
        """States of these names, summed over all processes (unless `synchronized` is False)."""
        states: list[Tensor] = [getattr(self, name) for name in names]
        return [_sum_over_processes(state) for state in states] if self.synchronized else states


class ScoreMetric(Metric):
    """Base of the metrics that need all scores at once: `keep` collects rows, `gathered` merges those of all processes.

    Args:
        num_classes: columns of the scores.
        multilabel: targets are rows as wide as the scores, otherwise single numbers.
    """

    def __init__(self, num_classes: int, *, multilabel: bool) -> None:
        self.num_classes, self.multilabel = num_classes, multilabel
        super().__init__()

    def reset(self) -> None:
        """Forget everything collected so far."""
        # A process without any sample takes part in `gathered` with these empty rows.
        width = (self.num_classes,)
        self._preds = [torch.zeros(0, *width, device=self.device)]
        self._target = [
            torch.zeros(0, *(width if self.multilabel else ()), dtype=torch.int64, device=self.device),
        ]

    def to(self, device: torch.device | str) -> Self:
        """Move the rows; return this metric."""
        self.device = torch.device(device)
        self._preds = [p.to(device) for p in self._preds]
        self._target = [t.to(device) for t in self._target]
        return self

    def keep(self, preds: Tensor, target: Tensor) -> None:
        """Collect a batch of scores and targets."""
        self._preds.append(preds.to(self.device, torch.float32))
        self._target.append(target.to(self.device, torch.int64))

    def gathered(self) -> tuple[Tensor, Tensor]:
        """Scores and targets of all processes (of this one, if `synchronized` is False).

        Raises:
            ValueError: there are none.
        """
        preds, target = (torch.cat(rows) for rows in (self._preds, self._target))
        if self.synchronized:
            preds, target = (torch.cat(gather_all_tensors(rows)) for rows in (preds, target))
        if len(preds) == 0:
            raise ValueError(f"{type(self).__name__}: no sample was counted, there is nothing to compute")
        return preds, target


def _sum_over_processes(state: Tensor) -> Tensor:
    if get_world_size() == 1:
        return state
    total = state.clone()  # the state itself must stay what this process has counted
    dist.all_reduce(total)
    return total
