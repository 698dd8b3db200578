"""Loaders of several resolutions, mixed batch by batch."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from typing import Any

import numpy as np

logger = logging.getLogger("dinov3")

_CHUNK = 1024


class CombiningMode(IntEnum):
    """Who picks the same loader in one iteration."""

    GLOBAL_HOMOGENEOUS = 0  # all processes: one seed
    LOCAL_HOMOGENEOUS = 1  # each process for itself: no seed


def normalized_ratios(ratios: Sequence[float]) -> list[float]:
    """The ratios as probabilities.

    Raises:
        ValueError: no ratios, a negative one, or all zero.
    """
    values = [float(ratio) for ratio in ratios]
    total = sum(values)
    if not values or min(values) < 0 or not 0 < total < float("inf"):
        raise ValueError(f"ratios must be non-negative numbers with a positive sum, got {list(ratios)}")
    # Ratios that are probabilities up to rounding stay as they are, and with them the draws.
    return values if abs(total - 1) < 1e-8 else [value / total for value in values]


def choices(seed: int, ratios: Sequence[float], n: int) -> np.ndarray:
    """Which loader each of the first n iterations takes in mode GLOBAL_HOMOGENEOUS: int64 [n].

    To continue a run at iteration n, give loader i the start iteration `(choices(seed, ratios, n) == i).sum()`, and the
    combined one n.
    """
    probabilities = normalized_ratios(ratios)
    return np.random.default_rng(seed).choice(len(probabilities), size=n, p=probabilities)


class CombinedDataLoader:
    """In each iteration, the next batch of a loader drawn by the given ratios; ends when the drawn loader does.

    Args:
        loaders_with_ratios: pairs (loader, ratio). Ratios that don't sum to one are normalised.
        batch_size: that all loaders must have.
        combining_mode: `GLOBAL_HOMOGENEOUS` (0): all processes draw the same loader; `LOCAL_HOMOGENEOUS` (1): each
            draws for itself, from a generator without a seed.
        seed: of mode 0.
        name: for log lines.
        logging_period: iterations between log lines on how often each loader was drawn; 0: none.
        start_iteration: continue after so many draws. The loaders must themselves start where they would be by then:
            see `choices`.

    Raises:
        ValueError: unknown mode, another batch size, bad ratios, or a start iteration in the mode without a seed.
    """

    GLOBAL_HOMOGENEOUS = CombiningMode.GLOBAL_HOMOGENEOUS
    LOCAL_HOMOGENEOUS = CombiningMode.LOCAL_HOMOGENEOUS

    def __init__(
        self,
        loaders_with_ratios: Iterable[tuple[Iterable[Any], float]],
        batch_size: int,
        combining_mode: int = CombiningMode.LOCAL_HOMOGENEOUS,
        seed: int = 65537,
        name: str | None = None,
        logging_period: int = 100,
        *,
        start_iteration: int = 0,
    ) -> None:
        pairs = list(loaders_with_ratios)
        if combining_mode not in tuple(CombiningMode):
            known = ", ".join(f"{mode.value} ({mode.name})" for mode in CombiningMode)
            raise ValueError(f"unknown combining_mode {combining_mode!r}; known: {known}")
        if start_iteration < 0 or (start_iteration and combining_mode != CombiningMode.GLOBAL_HOMOGENEOUS):
            raise ValueError(
                f"start_iteration {start_iteration} needs combining_mode {CombiningMode.GLOBAL_HOMOGENEOUS.value}: "
                "without a seed, earlier draws cannot be repeated"
            )
        self.loaders = [loader for loader, _ in pairs]
        self.ratios = normalized_ratios([ratio for _, ratio in pairs])
        self.batch_size = batch_size
        self.combining_mode = CombiningMode(combining_mode)
        self.seed = seed
        self.name = name or type(self).__name__
        self.logging_period = logging_period
        self.start_iteration = start_iteration
        for i, loader in enumerate(self.loaders):
            if (found := getattr(loader, "batch_size", None)) != batch_size:
                raise ValueError(f"{self.name}: loader {i} has batch_size {found}, expected {batch_size} as for all")

    @property
    def loader_count(self) -> int:
        """Number of loaders."""
        return len(self.loaders)

    def __iter__(self) -> Iterator[Any]:
        iterators = [iter(loader) for loader in self.loaders]
        drawn = [0] * self.loader_count
        for iteration, choice in enumerate(self._draws(), start=self.start_iteration + 1):
            try:
                batch = next(iterators[choice])
            except StopIteration:
                return
            drawn[choice] += 1
            if self.logging_period and iteration % self.logging_period == 0:
                logger.info(f"{self.name}: batches by loader since the start: {drawn}")
            yield batch

    def _draws(self) -> Iterator[int]:
        """Endless loader numbers. Drawing many at once gives the sequence of single draws."""
        rng = np.random.default_rng(self.seed if self.combining_mode == CombiningMode.GLOBAL_HOMOGENEOUS else None)
        rng.random(self.start_iteration)  # one number per draw
        while True:
            yield from rng.choice(self.loader_count, size=_CHUNK, p=self.ratios).tolist()
