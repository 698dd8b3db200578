import itertools
import logging
import os
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from dinov3.data import (
    DataAugmentationDINO,
    MaskingGenerator,
    SamplerType,
    collate_data_and_cast,
    loaders,
    make_data_loader,
    make_dataset,
)
from tests.helpers.images import write_image_folder

ENDLESS = [SamplerType.INFINITE, SamplerType.SHARDED_INFINITE, SamplerType.SHARDED_INFINITE_NEW]


def no_target(_: Any) -> tuple[()]:
    return ()


@pytest.fixture
def training(tmp_path: Path) -> partial[DataLoader[Any]]:
    """A loader of training batches, complete but for its position."""
    write_image_folder(tmp_path, classes=2, per_class=5, size=24)
    augment = DataAugmentationDINO((0.3, 1.0), (0.05, 0.3), 2, global_crops_size=16, local_crops_size=8)
    dataset = make_dataset(dataset_str=f"ImageFolder:root={tmp_path}", transform=augment, target_transform=no_target)
    collate = partial(
        collate_data_and_cast,
        mask_ratio_tuple=(0.1, 0.5),
        mask_probability=0.5,
        dtype=torch.float32,
        n_tokens=16,
        mask_generator=MaskingGenerator(4),
        random_circular_shift=True,
    )
    return partial(make_data_loader, dataset=dataset, batch_size=3, num_workers=0, seed=5, collate_fn=collate)


def take(loader: Any, n: int) -> list[dict[str, Any]]:
    return list(itertools.islice(loader, n))


def assert_equal_batches(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


def global_state() -> tuple[Any, ...]:
    numpy_state = np.random.get_state()
    return random.getstate(), numpy_state[1].tolist(), numpy_state[2], torch.get_rng_state().tolist()


@pytest.mark.parametrize("sampler_type", ENDLESS)
def test_a_continued_loader_gives_the_batches_of_the_uninterrupted_one(
    training: Any, sampler_type: SamplerType
) -> None:
    exact = partial(training, draw_seed=1, sampler_type=sampler_type)
    whole = take(exact(), 7)
    torch.manual_seed(99)  # what else has happened does not matter
    random.random()
    for start in (1, 4):  # 10 images in batches of 3: 4 lies in the second pass
        assert_equal_batches(take(exact(start_iteration=start), 7 - start), whole[start:])


def test_batches_do_not_depend_on_the_number_of_workers(training: Any) -> None:
    exact = partial(training, draw_seed=1)
    assert_equal_batches(take(exact(), 5), take(exact(num_workers=2), 5))
    assert_equal_batches(take(exact(), 5)[2:], take(exact(num_workers=2, start_iteration=2), 3))


def test_loading_leaves_the_global_generators_alone(training: Any) -> None:
    before = global_state()
    take(training(draw_seed=1), 3)
    take(training(draw_seed=1, num_workers=1), 1)
    assert global_state() == before


def test_without_a_draw_seed_the_global_generators_are_used(training: Any) -> None:
    before = global_state()
    take(training(), 1)
    assert all(a != b for a, b in zip(global_state()[::3], before[::3], strict=True))  # Python's and torch's
    assert global_state()[1:3] != before[1:3]


class SameImage:
    """One image under every index, so that only the draws can differ."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(())


def draw_per_sample_and_batch(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([*samples, torch.rand(())])


def test_every_place_batch_process_and_seed_has_its_own_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for rank, draw_seed in ((0, 0), (0, 1), (1, 0)):
        monkeypatch.setattr(loaders.distributed, "get_rank", lambda rank=rank: rank)
        loader = make_data_loader(
            dataset=SameImage(),
            batch_size=4,
            num_workers=0,
            draw_seed=draw_seed,
            collate_fn=draw_per_sample_and_batch,
        )
        drawn += take(loader, 10)
    assert torch.stack(drawn).unique().numel() == 3 * 10 * 5


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("sampler_type", ENDLESS)
def test_processes_continue_their_own_streams(
    world_size: int, sampler_type: SamplerType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders.distributed, "get_world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr(loaders.distributed, "get_rank", lambda rank=rank: rank)
        make = partial(
            make_data_loader, dataset=list(range(11)), batch_size=2, num_workers=0, seed=3, sampler_type=sampler_type
        )
        whole = torch.stack(take(make(), 12))
        assert torch.equal(torch.stack(take(make(start_iteration=5), 7)), whole[5:])


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(6))


def test_iterable_datasets_are_loaded_but_not_continued() -> None:
    loader = make_data_loader(dataset=Stream(), batch_size=2, num_workers=0)
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5]]
    for options in ({"draw_seed": 1}, {"start_iteration": 2}):
        with pytest.raises(ValueError, match="map-style dataset .* got the iterable dataset Stream"):
            make_data_loader(dataset=Stream(), batch_size=2, num_workers=0, **options)


@pytest.mark.parametrize("sampler_type", [SamplerType.EPOCH, SamplerType.DISTRIBUTED, None])
def test_samplers_that_end_are_not_continued(sampler_type: SamplerType | None) -> None:
    with pytest.raises(ValueError, match="endless sampler .*INFINITE.*got sampler_type="):
        make_data_loader(dataset=range(5), batch_size=2, num_workers=0, sampler_type=sampler_type, draw_seed=1)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_workers": -1}, {"start_iteration": -2}])
def test_impossible_numbers_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="need batch_size >= 1"):
        make_data_loader(**({"dataset": range(5), "batch_size": 2, "num_workers": 0} | options))


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="dataset is empty"):
        make_data_loader(dataset=[], batch_size=2, num_workers=0)


def test_one_process_needs_no_group_for_the_distributed_sampler() -> None:
    options = dict(dataset=range(5), batch_size=2, num_workers=0, shuffle=False, sampler_type=SamplerType.DISTRIBUTED)
    assert [batch.tolist() for batch in make_data_loader(**options, drop_last=False)] == [[0, 1], [2, 3], [4]]
    assert len(make_data_loader(**options)) == 2


def test_shuffling_without_a_sampler_is_said_to_have_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dinov3"):
        loader = make_data_loader(dataset=range(4), batch_size=2, num_workers=0, sampler_type=None)
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]
    assert "shuffle=True has no effect" in caplog.text


def test_memory_is_pinned_with_an_accelerator_only(monkeypatch: pytest.MonkeyPatch) -> None:
    make = partial(make_data_loader, dataset=range(4), batch_size=2, num_workers=0)
    for name, pinned in (("cpu", False), ("mps", False), ("cuda", True)):
        monkeypatch.setattr(loaders, "default_device", lambda name=name: torch.device(name))
        assert make().pin_memory is pinned


def test_persistent_workers_without_workers_are_dropped() -> None:
    assert not make_data_loader(
        dataset=range(4), batch_size=2, num_workers=0, persistent_workers=True
    ).persistent_workers
    assert make_data_loader(dataset=range(4), batch_size=2, num_workers=1, persistent_workers=True).persistent_workers


class Failing:
    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if index == 3:
            if self.how == "die":
                os._exit(3)
            raise OSError("the disk is on fire")
        return index


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_failure_names_its_sample(num_workers: int) -> None:
    loader = make_data_loader(
        dataset=Failing("raise"), batch_size=2, num_workers=num_workers, shuffle=False, draw_seed=1
    )
    with pytest.raises(OSError, match="the disk is on fire") as failure:
        take(loader, 2)
    report = str(failure.value) + "".join(getattr(failure.value, "__notes__", []))
    assert "while loading sample 3 (iteration 1, place 1 in the batch)" in report


def test_a_worker_that_dies_is_reported() -> None:
    loader = make_data_loader(dataset=Failing("die"), batch_size=2, num_workers=1, shuffle=False)
    with pytest.raises(RuntimeError, match="worker .* exited unexpectedly"):
        take(loader, 2)
