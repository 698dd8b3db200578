import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dinov3.data import CombinedDataLoader
from dinov3.data.meta_loaders import choices


class Counter:
    def __init__(self, number: int, batch_size: int = 4, first: int = 0) -> None:
        self.number, self.batch_size, self.first = number, batch_size, first

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.number, i) for i in itertools.count(self.first))


def take(loader: Any, n: int) -> list[Any]:
    return list(itertools.islice(loader, n))


def test_choices_are_the_draws_of_the_loader() -> None:
    ratios = [0.2, 0.5, 0.3]
    combined = CombinedDataLoader(zip(map(Counter, range(3)), ratios, strict=True), 4, combining_mode=0, seed=7)
    drawn = [number for number, _ in take(combined, 3000)]
    assert drawn == choices(7, ratios, 3000).tolist()
    one_by_one = np.random.default_rng(7)
    assert drawn[:50] == [int(one_by_one.choice(3, p=ratios)) for _ in range(50)]
    np.testing.assert_allclose(np.bincount(drawn) / 3000, ratios, atol=0.05)


@pytest.mark.parametrize("start", [1, 17, 2000])
def test_a_continued_mixture_equals_the_uninterrupted_one(start: int) -> None:
    ratios = [0.6, 0.4]
    whole = take(CombinedDataLoader(zip(map(Counter, range(2)), ratios, strict=True), 4, 0, seed=3), start + 50)
    counts = np.bincount(choices(3, ratios, start), minlength=2)
    loaders = [Counter(i, first=int(count)) for i, count in enumerate(counts)]
    continued = CombinedDataLoader(zip(loaders, ratios, strict=True), 4, 0, seed=3, start_iteration=start)
    assert take(continued, 50) == whole[start:]


def test_iterating_twice_gives_the_same_mixture() -> None:
    combined = CombinedDataLoader(zip(map(Counter, range(2)), [0.5, 0.5], strict=True), 4, combining_mode=0)
    assert take(combined, 20) == take(combined, 20)
    assert combined.loader_count == len(combined.loaders) == 2


def test_ratios_are_normalized() -> None:
    combined = CombinedDataLoader(zip(map(Counter, range(2)), [3, 1], strict=True), 4, combining_mode=0)
    assert combined.ratios == [0.75, 0.25]
    assert choices(1, [3, 1], 100).tolist() == choices(1, [0.75, 0.25], 100).tolist()


def test_without_a_seed_each_process_draws_for_itself() -> None:
    def drawn() -> list[int]:
        combined = CombinedDataLoader(zip(map(Counter, range(2)), [0.5, 0.5], strict=True), 4, combining_mode=1)
        return [number for number, _ in take(combined, 64)]

    assert drawn() != drawn()


def test_the_mixture_is_logged_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    combined = CombinedDataLoader([(Counter(0), 1.0)], 4, combining_mode=0, name="Mix", logging_period=10)
    with caplog.at_level(logging.INFO, "dinov3"):
        take(combined, 25)
    assert [record.message for record in caplog.records] == [
        "Mix: batches by loader since the start: [10]",
        "Mix: batches by loader since the start: [20]",
    ]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"combining_mode": 2}, r"unknown combining_mode 2; known: 0 \(GLOBAL_HOMOGENEOUS\), 1"),
        ({"batch_size": 8}, "loader 0 has batch_size 4, expected 8"),
        ({"start_iteration": 3, "combining_mode": 1}, "without a seed"),
        ({"start_iteration": -3}, "start_iteration -3"),
        ({"ratios": [0.0]}, "positive sum"),
        ({"ratios": [-1.0]}, "non-negative"),
        ({"ratios": [float("nan")]}, "positive sum"),
    ],
)
def test_bad_options_are_refused(kwargs: dict[str, Any], message: str) -> None:
    options = {"batch_size": 4, "combining_mode": 0} | kwargs
    ratios = options.pop("ratios", [1.0])
    with pytest.raises(ValueError, match=message):
        CombinedDataLoader(zip([Counter(0)], ratios, strict=True), **options)


def test_no_loaders_are_refused() -> None:
    with pytest.raises(ValueError, match="ratios"):
        CombinedDataLoader([], 4)
