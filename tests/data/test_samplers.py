"""Streams against the plain definitions of the contract, written down here index by index."""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from dinov3.data import samplers
from dinov3.data.samplers import EpochSampler, InfiniteSampler, ShardedInfiniteSampler

SLICES = [(0, 1), (1, 3), (2, 4), (6, 7)]


def take(stream: Any, n: int) -> list[int]:
    return list(itertools.islice(stream, n))


def plain_infinite(n: int, seed: int, start: int, step: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = list(range(n))
        for i in range(n):
            j = int(torch.randint(i, n, (1,), generator=generator))
            order[i], order[j] = order[j], order[i]
        yield from order[start::step]


def plain_sharded(n: int, seed: int, start: int, step: int, first_pass: int = 0, new: bool = False) -> Iterator[int]:
    share = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[start::step][: n // step].tolist()
    for number in itertools.count(first_pass):
        generator = torch.Generator().manual_seed(seed + start + (number << 24))
        if new:
            yield from (share[i] for i in torch.randperm(len(share), generator=generator).tolist())
            continue
        order: list[int] = []
        for i, item in enumerate(share):
            j = int(torch.randint(0, i + 1, (1,), generator=generator)) if i else 0
            order.append(item)
            order[i], order[j] = order[j], item
        yield from order


@pytest.mark.parametrize(("start", "step"), SLICES)
@pytest.mark.parametrize("n", [7, 20, 101])
def test_infinite_equals_its_definition(n: int, start: int, step: int) -> None:
    sampler = InfiniteSampler(sample_count=n, shuffle=True, seed=11, start=start, step=step)
    assert take(sampler, 4 * n) == take(plain_infinite(n, 11, start, step), 4 * n)


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize(("start", "step"), SLICES)
@pytest.mark.parametrize("n", [7, 20, 101])
def test_sharded_equals_its_definition(n: int, start: int, step: int, new: bool) -> None:
    sampler = ShardedInfiniteSampler(
        sample_count=n, shuffle=True, seed=2**33 + 5, start=start, step=step, use_new_shuffle_tensor_slice=new
    )
    assert take(sampler, 4 * n) == take(plain_sharded(n, 2**33 + 5, start, step, new=new), 4 * n)


def test_huge_datasets_take_the_same_streams_draw_by_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    # Beyond 2**32 / 20 (2**28) samples torch draws otherwise; there the definition itself runs.
    expected = [
        take(kind(sample_count=30, shuffle=True, seed=3, start=0, step=1), 90)
        for kind in (InfiniteSampler, ShardedInfiniteSampler)
    ]
    monkeypatch.setattr(samplers, "_MAX_RANDPERM_32_BITS", 1)
    monkeypatch.setattr(samplers, "_MAX_RANDINT_32_BITS", 1)
    for kind, stream in zip((InfiniteSampler, ShardedInfiniteSampler), expected, strict=True):
        assert take(kind(sample_count=30, shuffle=True, seed=3, start=0, step=1), 90) == stream


def variants() -> list[tuple[type, dict[str, Any]]]:
    return [
        (InfiniteSampler, {}),
        (ShardedInfiniteSampler, {}),
        (ShardedInfiniteSampler, {"use_new_shuffle_tensor_slice": True}),
    ]


@pytest.mark.parametrize(("kind", "options"), variants())
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("start", "step"), SLICES[:3])
@pytest.mark.parametrize("advance", [0, 5, 17])
def test_skip_equals_dropping(
    kind: type, options: dict[str, Any], shuffle: bool, start: int, step: int, advance: int
) -> None:
    common = dict(sample_count=13, shuffle=shuffle, seed=4, start=start, step=step, advance=advance, **options)
    stream = take(kind(**common), 100)
    for skip in (0, 1, 3, 4, 12, 13, 14, 50):
        assert take(kind(**common, skip=skip), 50) == stream[skip : skip + 50]


@pytest.mark.parametrize("shuffle", [False, True])
def test_infinite_advance_equals_dropping(shuffle: bool) -> None:
    common = dict(sample_count=13, shuffle=shuffle, seed=4, start=1, step=4)
    stream = take(InfiniteSampler(**common), 60)
    assert take(InfiniteSampler(**common, advance=23), 37) == stream[23:]


def test_sharded_advance_counts_passes_by_the_whole_dataset() -> None:
    # 27 = 2 * 13 + 1: from pass 2, one index left out, although this process sees 3 indices per pass.
    sampler = ShardedInfiniteSampler(sample_count=13, shuffle=True, seed=4, start=1, step=4, advance=27)
    assert take(sampler, 20) == take(plain_sharded(13, 4, 1, 4, first_pass=2), 21)[1:]


@pytest.mark.parametrize(("kind", "options"), variants())
def test_iterating_does_not_change_the_sampler(kind: type, options: dict[str, Any]) -> None:
    sampler = kind(sample_count=10, shuffle=True, start=0, step=1, advance=14, **options)
    first = take(sampler, 25)
    assert take(sampler, 25) == first


@pytest.mark.parametrize(("kind", "options"), variants())
def test_every_pass_sees_every_sample_once(kind: type, options: dict[str, Any]) -> None:
    streams = [take(kind(sample_count=12, shuffle=True, start=r, step=3, **options), 12) for r in range(3)]
    for number in range(3):
        in_pass = [index for stream in streams for index in stream[4 * number : 4 * number + 4]]
        assert sorted(in_pass) == list(range(12))


def test_sharded_processes_keep_to_their_share_and_say_what_is_never_seen(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dinov3"):
        streams = [take(ShardedInfiniteSampler(sample_count=14, shuffle=True, start=r, step=4), 30) for r in range(4)]
    shares = [set(stream) for stream in streams]
    assert [len(share) for share in shares] == [3] * 4
    assert len(set().union(*shares)) == 12
    assert "2 of them are never seen" in caplog.text


@pytest.mark.parametrize("kind", [InfiniteSampler, ShardedInfiniteSampler])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sample_count": 0, "start": 0, "step": 1}, "dataset is empty"),
        ({"sample_count": 3, "start": 3, "step": 4}, "process 3 of 4: there are 3"),
        ({"sample_count": 3, "start": 0, "step": 1, "advance": -1}, "advance must not be negative"),
        ({"sample_count": 3, "start": 0, "step": 1, "skip": -1}, "skip must not be negative"),
    ],
)
def test_endless_samplers_refuse_what_would_never_yield(kind: type, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(shuffle=True, **kwargs)


def test_slices_default_to_rank_and_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers.distributed, "get_rank", lambda: 2)
    monkeypatch.setattr(samplers.distributed, "get_world_size", lambda: 3)
    assert take(InfiniteSampler(sample_count=9), 4) == [2, 5, 8, 2]
    assert list(EpochSampler(size=9, sample_count=9)) == [2, 5, 8]


@pytest.mark.parametrize("size", [5, 10, 23, 40])
@pytest.mark.parametrize("shuffle", [False, True])
def test_epochs_share_the_repeated_samples_among_processes(size: int, shuffle: bool) -> None:
    parts = [EpochSampler(size=size, sample_count=10, shuffle=shuffle, seed=3, start=r, step=4) for r in range(4)]
    for part in parts:
        part.set_epoch(5)
        assert len(list(part)) == len(part)
    seen = np.bincount([index for part in parts for index in part], minlength=10)
    assert seen.sum() == size
    assert seen.max() <= -(-size // 10)


def test_epochs_differ_and_epoch_zero_has_one_order_for_all_seeds() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(size=50, sample_count=50, shuffle=True, seed=seed, start=0, step=1)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 1) != order(1, 2) != order(2, 2)
    assert order(1, 0) == order(2, 0)  # the published sequence: kept


def test_epochs_may_leave_a_process_empty() -> None:
    sampler = EpochSampler(size=2, sample_count=2, start=3, step=4)
    assert list(sampler) == []
    assert len(sampler) == 0


def test_epochs_refuse_an_empty_dataset() -> None:
    with pytest.raises(ValueError, match="sample_count must be at least 1, got 0"):
        EpochSampler(size=3, sample_count=0)
