"""Loaders: exact continuation, every image once in evaluation; dataset strings; labels beyond the classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from dinov3.data import DatasetWithEnumeratedTargets
from dinov3.eval.segmentation.config import DatasetsConfig, SegmentationConfig
from dinov3.eval.segmentation.data import (
    CheckedLabels,
    InfiniteDataloader,
    class_names,
    dataset_string,
    make_eval_loader,
    make_train_dataset,
    make_train_loader,
    worker_init_fn,
)
from tests.helpers.distributed import run_distributed


class Noisy(Dataset[Any]):
    """Item i is i with a random number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, np.random.rand()


def take(count: int, start: int = 0, workers: int = 0) -> list[Any]:
    loader = make_train_loader(Noisy(5), batch_size=2, num_workers=workers, seed=3, start_iteration=start)
    return [[part.tolist() for part in next(loader)] for _ in range(count)]


@pytest.mark.parametrize("start", [1, 3, 5])
def test_batches_continue_where_they_stopped(start: int) -> None:
    whole = take(8)
    assert take(8 - start, start) == whole[start:]
    np.random.rand(7)  # other draws don't matter
    assert take(8) == whole


def test_workers_change_nothing() -> None:
    assert take(4, workers=1) == take(4)


def test_every_epoch_is_another_permutation_of_all() -> None:
    batches = take(6)
    epochs = [sum((batch[0] for batch in batches[i : i + 3]), []) for i in (0, 3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(5))] * 2
    assert epochs[0] != epochs[1]
    assert len({draw for batch in batches for draw in batch[1]}) == 10


def test_a_loader_of_ones_own_starts_again_with_the_next_epoch() -> None:
    sampler: Any = torch.utils.data.DistributedSampler(Noisy(4), num_replicas=1, rank=0, seed=1)
    endless = InfiniteDataloader(DataLoader(Noisy(4), batch_size=2, sampler=sampler))
    assert len(endless) == 2
    seen = [next(endless)[0].tolist() for _ in range(5)]
    assert sampler.epoch == 2
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="data set is empty"):
        InfiniteDataloader(DataLoader(Noisy(0)))


def _shares() -> list[int]:
    loader = make_eval_loader(DatasetWithEnumeratedTargets(Noisy(5)), num_workers=0)
    return [int(index) for _, (index, _) in loader]


def test_every_image_is_evaluated_once(tmp_path: Path) -> None:
    assert _shares() == [0, 1, 2, 3, 4]
    assert run_distributed(_shares, 2, tmp_path) == [[0, 2, 4], [1, 3]]


def _first_epoch() -> list[int]:
    loader = make_train_loader(Noisy(4), batch_size=1, num_workers=0, seed=0)
    samples = [int(next(loader)[0]) for _ in range(2)]
    dist.barrier()
    return samples


def test_processes_share_an_epoch(tmp_path: Path) -> None:
    assert sorted(sum(run_distributed(_first_epoch, 2, tmp_path), [])) == [0, 1, 2, 3]


def test_seeds_of_workers() -> None:
    worker_init_fn(2, num_workers=4, rank=3, seed=100)  # 4 * 3 + 2 + 100 + 3
    drawn = np.random.rand(), float(torch.rand(1))
    np.random.seed(117)
    torch.manual_seed(117)
    assert drawn == (np.random.rand(), float(torch.rand(1)))


def test_roots_complete_dataset_strings() -> None:
    assert dataset_string("ADE20K:split=VAL", "/data") == "ADE20K:split=VAL:root=/data"
    assert dataset_string("ADE20K:split=VAL", "C:/data") == 'ADE20K:split=VAL:root="C:/data"'
    assert dataset_string("ADE20K:split=VAL:root=/other", "/data") == "ADE20K:split=VAL:root=/other"
    assert dataset_string("my.module:Mine", "") == "my.module:Mine"
    with pytest.raises(ValueError, match=r"datasets\.train and datasets\.val must name data sets"):
        dataset_string("", "/data")


def test_labels_beyond_the_classes_are_named() -> None:
    def transform(image: Any, label: Any) -> tuple[Any, torch.Tensor]:
        return image, torch.as_tensor(label)

    checked = CheckedLabels(transform, 3)
    checked(None, [[0, 2, 255]])
    with pytest.raises(ValueError, match=r"a label is 7, but there are 3 classes, 0 to 2 .*reduce_zero_label"):
        checked(None, [[0, 7, 255]])


def test_classes_without_a_name_have_numbers() -> None:
    dataset = Noisy(2)
    assert class_names(dataset, 2) == ["0", "1"]
    dataset.class_names = ["sky"]  # type: ignore[attr-defined]
    assert class_names(DatasetWithEnumeratedTargets(dataset), 2) == ["sky", "1"]
    with pytest.raises(ValueError, match="names 1 classes"):
        class_names(dataset, 0)


def test_batches_need_images_of_one_size() -> None:
    config = SegmentationConfig(datasets=DatasetsConfig(root="/x", train="ADE20K:split=TRAIN"), bs=2)
    config.transforms.train.img_size = 64
    with pytest.raises(ValueError, match=r"a batch of 2 needs images of one size: set transforms\.train\.crop_size"):
        make_train_dataset(config)
