import builtins
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3 import distributed
from tests.helpers.distributed import run_distributed


def test_without_a_group_everything_is_main() -> None:
    assert not distributed.is_enabled()
    assert (distributed.get_rank(), distributed.get_world_size()) == (0, 1)
    assert (distributed.get_subgroup_rank(), distributed.get_subgroup_size()) == (0, 1)
    assert distributed.is_main_process()
    assert distributed.is_subgroup_main_process()
    assert distributed.get_default_process_group() is None
    assert distributed.get_process_subgroup() is None
    with pytest.raises(RuntimeError, match="enable"):
        distributed.new_subgroups([[0]])


def test_enable_and_disable_are_symmetric(capsys: pytest.CaptureFixture[str]) -> None:
    environment, original = dict(os.environ), builtins.print
    for _ in range(2):
        distributed.enable(overwrite=True, restrict_print_to_main_process=True)
        try:
            assert distributed.is_enabled()
            assert distributed.get_process_subgroup() is distributed.get_default_process_group()
            assert builtins.print is not original
            with pytest.raises(RuntimeError, match="exists already"):
                distributed.enable(overwrite=True)
            distributed.new_subgroups([[0]])
            assert distributed.get_process_subgroup() is not distributed.get_default_process_group()
        finally:
            distributed.disable()
        assert not distributed.is_enabled()
        assert distributed.get_process_subgroup() is None
        assert builtins.print is original
        assert dict(os.environ) == environment
    distributed.disable()  # nothing left to undo


def _use_subgroups(folder: Path) -> Any:
    rank = distributed.get_rank()
    distributed.new_subgroups([[2], [0, 1]])
    group = distributed.get_process_subgroup()
    total = torch.tensor([float(rank)])
    torch.distributed.all_reduce(total, group=group)
    distributed.save_in_main_process({"rank": rank}, folder / f"group_of_{rank}.pt", group=group)
    distributed.save_in_main_process({"rank": rank}, folder / f"world_{rank}.pt")
    try:
        distributed.new_subgroups([[0, 1, 2]])
    except RuntimeError as error:
        second = str(error)
    return distributed.get_subgroup_rank(), distributed.get_subgroup_size(), total.item(), second


def test_subgroups_partition_the_world(tmp_path: Path) -> None:
    results = run_distributed(_use_subgroups, 3, tmp_path / "run", tmp_path)
    assert [r[:3] for r in results] == [(0, 2, 1.0), (1, 2, 1.0), (0, 1, 2.0)]
    assert all("created before" in r[3] for r in results)
    assert {p.name for p in tmp_path.glob("*.pt")} == {"world_0.pt", "group_of_0.pt", "group_of_2.pt"}


@pytest.mark.parametrize(
    ("ranks", "message"),
    [([[0], [0]], "disjoint"), ([[1]], "below the world size 1"), ([[]], "no subgroup holds rank 0")],
)
def test_bad_subgroups_are_refused(ranks: list[list[int]], message: str) -> None:
    distributed.enable(overwrite=True)
    try:
        with pytest.raises(ValueError, match=message):
            distributed.new_subgroups(ranks)
    finally:
        distributed.disable()


def _print_everywhere() -> list[str]:
    lines: list[str] = []
    builtins.print = lambda *args, **kwargs: lines.append(str(args[0]))
    distributed.enable(overwrite=True, restrict_print_to_main_process=True)
    builtins.print("only in rank 0")  # noqa: T201
    builtins.print("everywhere", force=True)  # noqa: T201
    return lines


def test_print_can_be_restricted_to_rank_0(tmp_path: Path) -> None:
    assert run_distributed(_print_everywhere, 2, tmp_path, init_group=False) == [
        ["only in rank 0", "everywhere"],
        ["everywhere"],
    ]
