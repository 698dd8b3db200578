"""Index streams: one pass (`EpochSampler`) or endless (`InfiniteSampler`, `ShardedInfiniteSampler`), one slice per
process.

The sequences are part of the public contract (equal seeds give the order of the published training code, index for
index); how they are computed is not. Every `iter()` starts the same stream anew.

Two ways to start later: `advance` follows the rule of the published code; `skip` drops exactly that many indices of
this process's own stream, so that a run which continues sees what an uninterrupted one would have seen.
"""

import itertools
import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from dinov3 import distributed

logger = logging.getLogger("dinov3")

# Up to these sizes torch draws an index from 32 random bits, and `randperm` from the same bits as one draw per index.
_MAX_RANDPERM_32_BITS = 2**32 // 20
_MAX_RANDINT_32_BITS = 2**28


class EpochSampler(Sampler[int]):
    """One pass over `size` indices drawn from `sample_count` samples, of which this process gets every `step`-th.

    Args:
        size: indices per epoch over all processes; the samples are repeated as often as needed.
        sample_count: number of samples of the dataset.
        shuffle: random order, drawn without replacement from the repeated indices.
        seed: the order of epoch e is seeded by `seed * e`, or by `e` if the seed is 0. (So epoch 0 has the same
            order for every seed: kept, because the sequence is contract.)
        start, step: slice of this process; the rank and the world size by default.
    """

    def __init__(
        self,
        *,
        size: int,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
    ) -> None:
        self._size = size
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start, self._step = _process_slice(start, step)
        self._epoch = 0
        for name, value in (("size", size), ("sample_count", sample_count), ("step", self._step)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def __iter__(self) -> Iterator[int]:
        if self._shuffle:
            repeats = -(-self._size // self._sample_count)
            seed = self._seed * self._epoch if self._seed != 0 else self._epoch
            # Choosing positions and reducing them equals choosing from the tiled indices, without building those.
            order = np.random.default_rng(seed).choice(repeats * self._sample_count, self._size, replace=False)
        else:
            order = np.arange(self._size)
        yield from (order[self._start :: self._step] % self._sample_count).tolist()

    def __len__(self) -> int:
        return -(-(self._size - self._start) // self._step)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next `iter()`."""
        self._epoch = epoch


class InfiniteSampler(Sampler[int]):
    """Endless passes over all samples; every pass is a new permutation of the whole dataset, cut into process slices.

    Args:
        sample_count: number of samples of the dataset.
        shuffle: random order, new in every pass.
        seed: of the one generator that serves all passes.
        start, step: slice of this process; the rank and the world size by default.
        advance: leave out that many indices of this process at the start.
        skip: the same, added to `advance` (see the module's docstring: here the two rules agree).
    """

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        advance: int = 0,
        skip: int = 0,
    ) -> None:
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start, self._step = _process_slice(start, step)
        _check_slice(sample_count, self._start, self._step)
        self._dropped = _non_negative("advance", advance) + _non_negative("skip", skip)

    def __iter__(self) -> Iterator[int]:
        n_passes, rest = divmod(self._dropped, len(range(self._start, self._sample_count, self._step)))
        passes = self._shuffled_passes(n_passes) if self._shuffle else self._plain_passes()
        yield from itertools.islice(itertools.chain.from_iterable(passes), rest, None)

    def _plain_passes(self) -> Iterator[range]:
        return itertools.repeat(range(self._start, self._sample_count, self._step))

    def _shuffled_passes(self, n_left_out: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed)
        for number in itertools.count():
            permutation = _permutation(self._sample_count, generator)
            if number >= n_left_out:
                yield permutation[self._start :: self._step].tolist()


class ShardedInfiniteSampler(Sampler[int]):
    """Endless passes in which each process keeps to its own share of the samples, reshuffled in every pass.

    The share is a slice of one fixed permutation, cut to `sample_count // step` items so that all processes have
    equally
    many: the last `sample_count mod step` items of that permutation are never seen.

    Args:
        sample_count: number of samples of the dataset.
        shuffle: random order; otherwise the passes are those of `InfiniteSampler`.
        seed: of the fixed permutation; pass t is seeded by `seed + start + (t << 24)`, of which torch uses 32 bits:
            orders repeat every 256 passes.
        start, step: slice of this process; the rank and the world size by default.
        advance: rule of the published code. The first pass is number `advance // sample_count` (the count of the whole
            dataset, although `advance` counts indices of this process), and `advance mod sample_count` indices are left
            out from there. With several processes this is not where an uninterrupted run would be: see `skip`.
        use_new_shuffle_tensor_slice: the other of two shuffles, `torch.randperm`.
        skip: leave out exactly that many further indices of this process's stream.
    """

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        advance: int = 0,
        use_new_shuffle_tensor_slice: bool = False,
        skip: int = 0,
    ) -> None:
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start, self._step = _process_slice(start, step)
        self._shuffle_slice = _shuffle_slice_new if use_new_shuffle_tensor_slice else _shuffle_slice_default
        self._first_pass, advance = divmod(_non_negative("advance", advance), sample_count or 1)
        self._dropped = advance + _non_negative("skip", skip)
        _check_slice(sample_count, self._start, self._step)
        if shuffle and sample_count < self._step:
            raise ValueError(f"{sample_count} samples cannot be shared among {self._step} processes")
        if shuffle and sample_count % self._step:
            logger.warning(
                f"{sample_count} samples shared among {self._step} processes: "
                f"{sample_count % self._step} of them are never seen"
            )

    def __iter__(self) -> Iterator[int]:
        if self._shuffle:
            n_passes, rest = divmod(self._dropped, self._sample_count // self._step)
            passes = self._shuffled_passes(self._first_pass + n_passes)
        else:
            plain_pass = range(self._start, self._sample_count, self._step)
            rest = self._dropped % len(plain_pass)
            passes = itertools.repeat(plain_pass)
        yield from itertools.islice(itertools.chain.from_iterable(passes), rest, None)

    def _shuffled_passes(self, first: int) -> Iterator[list[int]] | Iterator[range]:
        permutation = torch.randperm(self._sample_count, generator=torch.Generator().manual_seed(self._seed))
        share = permutation[self._start :: self._step][: self._sample_count // self._step].clone()
        for number in itertools.count(first):
            yield self._shuffle_slice(share, self._seed + self._start + (number << 24))


def _process_slice(start: int | None, step: int | None) -> tuple[int, int]:
    return (
        distributed.get_rank() if start is None else start,
        distributed.get_world_size() if step is None else step,
    )


def _check_slice(sample_count: int, start: int, step: int) -> None:
    """An endless sampler without a single index would never return; say so at once."""
    if sample_count < 1:
        raise ValueError(f"sample_count must be at least 1, got {sample_count}: the dataset is empty")
    if step < 1 or not 0 <= start < sample_count:
        raise ValueError(
            f"no sample is left for process {start} of {step}: there are {sample_count}; "
            "use fewer processes or more samples"
        )


def _non_negative(name: str, value: int) -> int:
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value


def _permutation(n: int, generator: torch.Generator) -> torch.Tensor:
    """Forward Fisher-Yates with one draw `j = randint(i, n)` for every i: integer tensor [n]."""
    if n >= _MAX_RANDPERM_32_BITS:
        order = torch.arange(n)
        for i in range(n):
            j = int(torch.randint(i, n, (1,), generator=generator))
            order[i], order[j] = order[j].clone(), order[i].clone()
        return order
    # `randperm` does the same swaps, but leaves out the last draw, which changes nothing: made up for here, because it
    # decides where the next pass begins in the generator's stream.
    order = torch.randperm(n, generator=generator, dtype=torch.int32)
    torch.randint(0, 1, (1,), generator=generator)
    return order


def _shuffle_slice_default(items: torch.Tensor, seed: int) -> list[int]:
    """Inside-out Fisher-Yates with one draw `j = randint(0, i + 1)` for every i > 0."""
    n = items.numel()
    if n > _MAX_RANDINT_32_BITS:
        generator = torch.Generator().manual_seed(seed)
        draws = [int(torch.randint(0, i + 1, (1,), generator=generator)) for i in range(1, n)]
    else:
        # Torch's CPU generator is the Mersenne Twister that NumPy's legacy one is, and `randint(0, k)` is its next 32
        # bits modulo k: all draws at once.
        bits = np.random.RandomState(seed % 2**32).randint(0, 2**32, size=n - 1, dtype=np.uint32)
        draws = (bits.astype(np.int64) % np.arange(2, n + 1)).tolist()
    shuffled = items.tolist()
    for i, j in enumerate(draws, start=1):
        shuffled[i], shuffled[j] = shuffled[j], shuffled[i]
    return shuffled


def _shuffle_slice_new(items: torch.Tensor, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return items[torch.randperm(items.numel(), generator=generator)].tolist()
