"""Random draws that depend on a key, not on what happened before: the basis of exact resume.

With these wrappers around a dataset, its sampler and its collate function, the crops of a sample and the masks of a
batch are functions of (seed, process, iteration, position in the batch). They are the same for any number of workers,
and leave the process's own generators as they were, so loading in the main process doesn't disturb the training's
random state.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, default_collate


@contextmanager
def seeded_draws(*key: int | str) -> Iterator[None]:
    """Within the block, the global generators of `random`, `numpy.random` and torch (CPU) are seeded by `key`.

    Afterwards they continue as if the block had not been.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=20).digest()
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int.from_bytes(digest[:8], "little"))
    np.random.seed(int.from_bytes(digest[8:12], "little"))
    # Not `torch.manual_seed`, which would reseed the accelerators as well.
    torch.default_generator.manual_seed(int.from_bytes(digest[12:], "little"))
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


class Draw(NamedTuple):
    """One item of a stream: the `position`-th one of this process is the dataset's sample number `sample`."""

    position: int
    sample: int


class PositionedSampler(Sampler[Draw]):
    """Counts what a sampler yields, from `first_position`."""

    def __init__(self, sampler: Sampler[int], first_position: int = 0) -> None:
        self.sampler = sampler
        self.first_position = first_position

    def __iter__(self) -> Iterator[Draw]:
        for position, index in enumerate(self.sampler, self.first_position):
            yield Draw(position, index)


class SeededDataset(Dataset[tuple[int, Any]]):
    """Reads `dataset[draw.sample]` under draws seeded by (seed, rank, iteration, place in the batch).

    Items are (position, sample); `SeededCollate` takes the positions off again.
    """

    def __init__(self, dataset: Dataset[Any], *, draw_seed: int, rank: int, batch_size: int) -> None:
        self.dataset = dataset
        self.draw_seed = draw_seed
        self.rank = rank
        self.batch_size = batch_size

    def __getitem__(self, draw: Draw) -> tuple[int, Any]:
        iteration, place = divmod(draw.position, self.batch_size)
        with seeded_draws("sample", self.draw_seed, self.rank, iteration, place):
            try:
                return draw.position, self.dataset[draw.sample]
            except Exception as error:
                error.add_note(
                    f"while loading sample {draw.sample} (iteration {iteration}, place {place} in the batch)"
                )
                raise

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


class SeededCollate:
    """Collates under draws seeded by (seed, rank, iteration)."""

    def __init__(
        self, collate_fn: Callable[[list[Any]], Any] | None, *, draw_seed: int, rank: int, batch_size: int
    ) -> None:
        self.collate_fn = collate_fn or default_collate
        self.draw_seed = draw_seed
        self.rank = rank
        self.batch_size = batch_size

    def __call__(self, items: Sequence[tuple[int, Any]]) -> Any:
        iteration = items[0][0] // self.batch_size
        with seeded_draws("batch", self.draw_seed, self.rank, iteration):
            return self.collate_fn([sample for _, sample in items])
