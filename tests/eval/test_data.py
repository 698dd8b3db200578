"""Labels of data sets, validation splits, few-shot selections, lists of labels in a batch."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset

from dinov3.eval.data import (
    SubsetEx,
    create_class_indices_mapping,
    create_train_dataset_dict,
    get_labels,
    get_num_classes,
    pad_multilabel_and_collate,
    split_train_val_datasets,
)


class _Items(Dataset[Any]):
    """Labels only inside the items."""

    def __init__(self, targets: Any, target_transform: Any = None) -> None:
        self.targets, self.target_transform = targets, target_transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[None, Any]:
        target = self.targets[index]
        return None, target if self.target_transform is None else self.target_transform(target)


class _Target(_Items):
    def __getitem__(self, index: int) -> Any:
        raise AssertionError("items must not be loaded to read labels")

    def get_target(self, index: int) -> Any:
        return self.targets[index]


class _Targets(_Target):
    def get_target(self, index: int) -> Any:
        raise AssertionError("targets must not be read one by one")

    def get_targets(self) -> Any:
        return self.targets


@pytest.mark.parametrize("kind", [_Items, _Target, _Targets])
@pytest.mark.parametrize("targets", [[2, 0, 1], np.array([2, 0, 1], dtype="<u4"), torch.tensor([2, 0, 1])])
def test_labels_from_any_source(kind: type[_Items], targets: Any) -> None:
    labels = get_labels(kind(targets))
    assert labels.dtype == torch.int64
    assert labels.tolist() == [2, 0, 1]
    assert get_labels(kind(targets, target_transform=lambda t: 10 * int(t))).tolist() == [20, 0, 10]


def test_multi_hot_labels_and_number_of_classes() -> None:
    rows = [np.array([0, 1, 1]), np.array([1, 0, 0])]
    assert get_labels(_Target(rows)).tolist() == [[0, 1, 1], [1, 0, 0]]
    assert get_num_classes(_Target(rows)) == 3
    assert get_num_classes(_Target([0, 4, 1])) == 5


def test_labels_of_subsets_come_from_the_whole() -> None:
    dataset = _Targets([5, 6, 7, 8])
    assert get_labels(Subset(dataset, [3, 0])).tolist() == [8, 5]
    assert get_labels(SubsetEx(Subset(dataset, [3, 0]), [1])).tolist() == [5]


def test_data_without_labels_is_named() -> None:
    with pytest.raises(ValueError, match=r"_Target: expected class numbers.*the first one is None"):
        get_labels(_Target([None, None]))
    with pytest.raises(ValueError, match="rows of equal length"):
        get_labels(_Target([[1, 2], [3]]))
    with pytest.raises(ValueError, match="empty"):
        get_num_classes(_Target([]))


def test_mapping_lists_only_classes_that_occur() -> None:
    mapping = create_class_indices_mapping(torch.tensor([7, 2, 7, 7, 2]))
    assert {c: p.tolist() for c, p in mapping.items()} == {2: [1, 4], 7: [0, 2, 3]}
    multi = create_class_indices_mapping(torch.tensor([[1, 0, 1], [0, 0, 1]]))
    assert {c: p.tolist() for c, p in multi.items()} == {0: [0], 2: [0, 1]}


def test_split_leaves_single_items_in_the_train_set_and_loses_none() -> None:
    targets = [0] * 20 + [1] * 3 + [2]
    train, val = split_train_val_datasets(_Targets(targets), split_percentage=0.2)
    assert sorted(train.indices + val.indices) == list(range(24))
    assert sorted(targets[i] for i in val.indices) == [0] * 4 + [1]
    again = split_train_val_datasets(_Targets(targets), split_percentage=0.2)
    assert (train.indices, val.indices) == (again[0].indices, again[1].indices)
    ordered, _ = split_train_val_datasets(_Targets(targets), split_percentage=0.2, shuffle_train=False)
    assert ordered.indices == sorted(ordered.indices)
    assert train.indices != sorted(train.indices)


def test_few_shot_takes_so_many_of_each_class(caplog: pytest.LogCaptureFixture) -> None:
    targets = torch.tensor([0] * 10 + [1] * 2 + [4] * 30)
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        subsets = create_train_dataset_dict(_Targets(targets), True, 5, 3)
    assert "1 classes have fewer than 5 items" in caplog.text
    assert list(subsets) == [0, 1, 2]
    for subset in subsets.values():
        assert subset.indices == sorted(subset.indices)
        assert torch.bincount(targets[subset.indices]).tolist() == [5, 2, 0, 0, 5]
    assert subsets[0].indices != subsets[1].indices
    fraction = create_train_dataset_dict(_Targets(targets), True, 0.1, 1)[0]
    assert torch.bincount(targets[fraction.indices]).tolist() == [1, 1, 0, 0, 3]


def test_few_shot_of_multi_hot_labels_comes_near_the_fraction() -> None:
    rows = (torch.rand(400, 5) > 0.6).long()
    subset = create_train_dataset_dict(_Targets(rows), True, 0.25, 1)[0]
    share = rows[subset.indices].sum() / rows.sum()
    assert 0.2 < share < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((False, 5, 1), "no effect without few_shot.enable=true"),
        ((False, None, 3), "no effect without few_shot.enable=true"),
        ((True, None, 1), "needs few_shot.k_or_percent > 0"),
        ((True, 5, 0), "few_shot.n_tries >= 1"),
    ],
)
def test_contradictory_few_shot_options_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_train_dataset_dict(_Targets([0, 1]), *arguments)
    assert list(create_train_dataset_dict(_Targets([0, 1]), False, None, 1)) == [0]


def test_subset_gives_targets_and_transforms_of_the_whole() -> None:
    dataset = _Target([4, 5, 6])
    dataset.transforms = object()
    subset = SubsetEx(dataset, [2, 0])
    assert subset.get_target(0) == 6
    assert subset.transforms is dataset.transforms
    assert SubsetEx(_Target([1]), [0]).transforms is None


def test_padding_of_lists_without_any_label() -> None:
    images, (index, targets) = pad_multilabel_and_collate([(torch.zeros(2), (3, [])), (torch.ones(2), (4, []))])
    assert images.shape == (2, 2)
    assert index.tolist() == [3, 4]
    assert targets.shape == (2, 0)
