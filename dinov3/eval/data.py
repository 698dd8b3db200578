"""Data sets of evaluations by their strings, their labels, and parts of them: validation split, few-shot selections."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Subset, default_collate

from dinov3.data import SamplerType, make_data_loader
from dinov3.data.registry import has_root, with_root

logger = logging.getLogger("dinov3")


def dataset_string(name: str, root: str) -> str:
    """The dataset string `name` of a configuration, completed by `datasets.root` unless it has a root.

    Raises:
        ValueError: neither has one.
    """
    if not root and not has_root(name):
        raise ValueError(
            f"the data set {name!r} has no root: set datasets.root=<folder>, or write {name}:root=<folder>"
        )
    return with_root(name, root)


def short_name(dataset_str: str) -> str:
    """What results call a data set: the text before the first colon."""
    return dataset_str.partition(":")[0]


def make_endless_loader(
    dataset: Any,
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
    done: int,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> Any:
    """Batches for the training of a head, without end; order and draws are functions of (seed, rank, iteration).

    Args:
        dataset: of samples.
        batch_size: per process.
        num_workers: processes that load, per process.
        seed: of the order of the samples, and of their augmentations.
        done: iterations that are done: the stream starts behind them.
        collate_fn: from samples to a batch; default: torch's.
    """
    return make_data_loader(
        dataset=dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        shuffle=True,
        seed=seed,
        sampler_type=SamplerType.INFINITE,
        drop_last=True,
        persistent_workers=True,
        collate_fn=collate_fn,
        draw_seed=seed,
        start_iteration=done,
    )


class SubsetEx(Subset[Any]):
    """A `Subset` that also knows the targets and transforms of its data set."""

    def get_target(self, index: int) -> Any:
        """Target of an item, as the data set's own `get_target` gives it."""
        return self.dataset.get_target(self.indices[index])  # type: ignore[attr-defined]

    def was_skipped(self, index: int) -> bool:
        """Whether the data set has given another item in the place of this one."""
        was_skipped = getattr(self.dataset, "was_skipped", None)
        return was_skipped is not None and was_skipped(self.indices[index])

    @property
    def skipped(self) -> Any:
        """The data set's list of samples that can't be read, None without one."""
        return getattr(self.dataset, "skipped", None)

    @property
    def transforms(self) -> Any:
        """Transforms of the data set."""
        return getattr(self.dataset, "transforms", None)


def report_skipped(dataset: Any, output_dir: str | os.PathLike[str], role: str = "") -> None:
    """Let a data set write the names of samples that it can't read to `skipped_files[_<role>].jsonl`.

    Its log lines, made by the loaders, then tell where the list is. For data sets without such a list nothing happens.
    """
    skipped = getattr(dataset, "skipped", None)
    if skipped is not None:
        skipped.move_to(Path(output_dir or ".") / f"skipped_files{'_' if role else ''}{role}.jsonl")


def get_labels(dataset: Any) -> Tensor:
    """Labels of all items, after the target transform: class numbers `[N]` or multi-hot rows `[N, C]`, int64.

    They come from `get_targets()` if there is one, else from `get_target(i)`, else from the items themselves (which
    decodes all images).

    Raises:
        ValueError: there are no labels, or they are not class numbers or rows of equal length.
    """
    if isinstance(dataset, Subset):
        return get_labels(dataset.dataset)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    targets = dataset.get_targets() if hasattr(dataset, "get_targets") else None
    if targets is None and hasattr(dataset, "get_target"):
        targets = [dataset.get_target(i) for i in range(len(dataset))]
    if targets is None:
        logger.info("reading the labels of %s from its items, images included", type(dataset).__name__)
        return _as_labels(dataset, [dataset[i][1] for i in range(len(dataset))])
    transform = _target_transform(dataset)
    return _as_labels(dataset, targets if transform is None else [transform(target) for target in targets])


def _target_transform(dataset: Any) -> Any:
    transforms = getattr(dataset, "transforms", None)
    return getattr(transforms, "target_transform", None) or getattr(dataset, "target_transform", None)


def _as_labels(dataset: Any, targets: Any) -> Tensor:
    try:
        if isinstance(targets, Tensor):
            return targets.to(torch.int64)
        if len(targets) and isinstance(targets[0], Tensor):
            return torch.stack(list(targets)).to(torch.int64)
        return torch.from_numpy(np.asarray(targets).astype(np.int64))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{type(dataset).__name__}: expected class numbers, or multi-hot rows of equal length, as targets; "
            f"the first one is {targets[0]!r:.80}"
        ) from error


def get_num_classes(dataset: Any) -> int:
    """Number of classes: the largest label plus one, or the number of columns of multi-hot labels."""
    return num_classes_of(get_labels(dataset))


def num_classes_of(labels: Tensor) -> int:
    """`get_num_classes` of labels that were read before."""
    if len(labels) == 0:
        raise ValueError("the data set is empty: it has no classes")
    return int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]


def get_class_names(dataset: Any, num_classes: int) -> list[str]:
    """Name by class number where the data set has them (`class_names` or `find_class_name`); otherwise no names."""
    names = list(getattr(dataset, "class_names", ()))
    if not names and hasattr(dataset, "find_class_name"):
        names = [str(dataset.find_class_name(number)) for number in range(num_classes)]
    return names


def create_class_indices_mapping(labels: Tensor) -> dict[int, Tensor]:
    """Positions of the items of each class, ascending; only classes that occur, in ascending order.

    Args:
        labels: class numbers `[N]`, or multi-hot rows `[N, C]` (a position appears in each of its classes).
    """
    if labels.ndim == 2:
        positions = {c: labels[:, c].nonzero().flatten() for c in range(labels.shape[1])}
        return {c: p for c, p in positions.items() if len(p)}
    classes, counts = labels.unique(return_counts=True)
    positions = labels.argsort(stable=True).split(counts.tolist())
    return dict(zip(classes.tolist(), positions, strict=True))


def split_train_val_datasets(
    dataset: Any, split_percentage: float = 0.1, shuffle_train: bool = True
) -> tuple[SubsetEx, SubsetEx]:
    """Take a part of every class for validation: (train, validation).

    The items are put into a random order, always the same; of each class the first ones of this order, at least one, go
    to the validation set. A class of one item stays in the train set. Both parts keep the order.

    Args:
        dataset: what to split.
        split_percentage: part that goes to the validation set, from 0 to 1.
        shuffle_train: use the random order; otherwise that of the data set.
    """
    labels = get_labels(dataset)
    order = torch.arange(len(labels))
    if shuffle_train:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    in_validation = torch.zeros(len(labels), dtype=torch.bool)  # by place in the order
    for places in create_class_indices_mapping(labels[order]).values():
        if len(places) > 1:
            in_validation[places[: max(1, int(split_percentage * len(places)))]] = True
    return SubsetEx(dataset, order[~in_validation].tolist()), SubsetEx(dataset, order[in_validation].tolist())


def create_train_dataset_dict(
    dataset: Any, few_shot_eval: bool, few_shot_k_or_percent: float | None, few_shot_n_tries: int
) -> dict[int, Any]:
    """The train sets to evaluate with, by try: the data set itself, or one random selection per try.

    A selection takes from every class k items (all of a smaller class), or a fraction of it, at least one item.
    Multi-hot items carry other labels along, so that a fraction of every class gives too many: then the fraction is
    reduced to come near that fraction of all labels.

    Args:
        dataset: the whole train set.
        few_shot_eval: select.
        few_shot_k_or_percent: items per class if 1 or more, else the fraction of each class.
        few_shot_n_tries: number of selections; try t is seeded with t.

    Raises:
        ValueError: k is missing or not positive, or k or several tries are given without few-shot evaluation.
    """
    if not few_shot_eval:
        if few_shot_k_or_percent is not None or few_shot_n_tries != 1:
            raise ValueError(
                f"few_shot.k_or_percent={few_shot_k_or_percent} and few_shot.n_tries={few_shot_n_tries} have no effect "
                "without few_shot.enable=true: leave them out, or enable it"
            )
        return {0: dataset}
    if few_shot_k_or_percent is None or few_shot_k_or_percent <= 0 or few_shot_n_tries < 1:
        raise ValueError(
            "few_shot.enable=true needs few_shot.k_or_percent > 0 (items per class, or a fraction below 1) and "
            f"few_shot.n_tries >= 1, got {few_shot_k_or_percent} and {few_shot_n_tries}"
        )
    labels = get_labels(dataset)
    mapping = create_class_indices_mapping(labels)
    _warn_small_classes(mapping, few_shot_k_or_percent)
    return {
        t: SubsetEx(dataset, _select_few_shot(labels, mapping, few_shot_k_or_percent, seed=t).tolist())
        for t in range(few_shot_n_tries)
    }


def _warn_small_classes(mapping: Mapping[int, Tensor], k: float) -> None:
    small = [c for c, positions in mapping.items() if len(positions) < int(k)]
    if small:
        logger.warning(
            "%d classes have fewer than %d items; all of theirs are taken (first: class %d)", len(small), k, small[0]
        )


def _select_few_shot(labels: Tensor, mapping: Mapping[int, Tensor], k: float, seed: int) -> Tensor:
    """Positions of one selection, ascending."""
    selected = _select_per_class(mapping, k, seed)
    if labels.ndim == 2 and k < 1:
        wanted, got = int(int(labels.sum()) * k), int(labels[selected].sum())
        selected = _select_per_class(mapping, k * wanted / got, seed)
    return selected


def _select_per_class(mapping: Mapping[int, Tensor], k: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    selected = []
    for _, positions in sorted(mapping.items()):
        count = int(k) if k >= 1 else max(1, int(len(positions) * k))
        selected.append(positions[torch.randperm(len(positions), generator=generator)[:count]])
    return torch.cat(selected).unique()  # sorted


def pad_multilabel_and_collate(
    batch: Sequence[tuple[Any, tuple[int, Sequence[int]]]], pad_value: int = -1
) -> tuple[Any, tuple[Tensor, Tensor]]:
    """Collate items (image, (index, list of labels)): (images, (indices `[B]`, labels `[B, longest list]`)).

    Args:
        batch: the items; lists may be of any length, 0 too.
        pad_value: fills the lists up.
    """
    images, enumerated = zip(*batch, strict=True)
    indices, targets = zip(*enumerated, strict=True)
    rows = [torch.as_tensor(target, dtype=torch.int64) for target in targets]
    return default_collate(list(images)), (
        torch.tensor(indices),
        pad_sequence(rows, batch_first=True, padding_value=pad_value),
    )


def equal_widths(rows: Sequence[Tensor], padding: float) -> list[Tensor]:
    """Tables `[B, L]` filled up to the width of the widest; tensors of other shapes as they are."""
    if rows[0].ndim != 2:
        return list(rows)
    widest = max(table.shape[1] for table in rows)
    return [pad(table, (0, widest - table.shape[1]), value=padding) for table in rows]
