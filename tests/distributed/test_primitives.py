from pathlib import Path
from typing import Any

import torch

from dinov3 import distributed
from tests.helpers.distributed import run_distributed


def test_without_a_group_inputs_come_back() -> None:
    values = {"b": torch.tensor(1.0), "a": torch.tensor(2.0)}
    assert distributed.reduce_dict(values) is values
    (only,) = distributed.gather_all_tensors(torch.arange(3))
    assert only.tolist() == [0, 1, 2]


def _reduce_and_gather() -> Any:
    rank = distributed.get_rank()
    values = {"b": torch.tensor(float(rank)), "a": torch.tensor(10.0 * rank)}
    if rank:  # another order of keys must not mix them up
        values = dict(reversed(values.items()))
    mean = {k: v.item() for k, v in distributed.reduce_dict(values).items()}
    total = {k: v.item() for k, v in distributed.reduce_dict(values, average=False).items()}
    ragged = torch.full((rank, 2, 3 - rank), rank, dtype=torch.int64)
    gathered = [t.tolist() for t in distributed.gather_all_tensors(ragged)]
    scalars = [t.item() for t in distributed.gather_all_tensors(torch.tensor(rank + 0.5))]
    flags = [t.tolist() for t in distributed.gather_all_tensors(torch.arange(rank + 1) > 0)]
    empty = [tuple(t.shape) for t in distributed.gather_all_tensors(torch.zeros(0, rank))]
    distributed.new_subgroups([[0, 2], [1]])
    pair = [t.item() for t in distributed.gather_all_tensors(torch.tensor(rank), distributed.get_process_subgroup())]
    return mean, total, gathered, scalars, flags, empty, pair


def test_reduce_and_gather_over_three_processes(tmp_path: Path) -> None:
    results = run_distributed(_reduce_and_gather, 3, tmp_path)
    for rank, (mean, total, gathered, scalars, flags, empty, pair) in enumerate(results):
        assert mean == {"a": 10.0, "b": 1.0}
        assert list(mean) == (["b", "a"] if rank == 0 else ["a", "b"])
        assert total == {"a": 30.0, "b": 3.0}
        assert gathered == [[], [[[1, 1], [1, 1]]], [[[2], [2]], [[2], [2]]]]
        assert scalars == [0.5, 1.5, 2.5]
        assert flags == [[False], [False, True], [False, True, True]]
        assert empty == [(0, 0), (0, 1), (0, 2)]
        assert pair == ([1] if rank == 1 else [0, 2])
