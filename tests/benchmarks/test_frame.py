"""The benchmarks' frame: ratios, merging, the page; not what it measures."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import find_benchmarks, main
from benchmarks.frame.bench import Bench
from benchmarks.frame.machine import describe_machine, versions
from benchmarks.frame.measure import PeakMemory, peak_memory, time_in_turns
from benchmarks.frame.report import read_gaps, to_markdown, write_report
from benchmarks.frame.results import Row, merge, read_rows, spread_of, summarise, write_rows

CPU = torch.device("cpu")


def row(name: str, **changes: object) -> Row:
    base = Row(name, 2.0, 3.0, "other", 1.5, 1.2, "cpu", "ms", "table", others={"other": 3.0}, machine="a machine")
    return replace(base, **changes)  # type: ignore[arg-type]


def bench(folder: Path, **options: object) -> Bench:
    return Bench(folder, "a command", device=CPU, threads=1, quick=True, **options)  # type: ignore[arg-type]


def test_a_ratio_above_one_is_better_for_times_and_for_rates() -> None:
    times = summarise({"ours": [2.0, 4.0, 3.0], "slow": [9.0, 9.0, 9.0], "fast": [6.0, 6.0, 6.0]}, "ms")
    assert (times["ours"], times["theirs"], times["alternative"], times["ratio"]) == (3.0, 6.0, "fast", 2.0)
    assert times["others"] == {"slow": 9.0, "fast": 6.0}
    rates = summarise({"ours": [3.0], "slow": [1.0], "fast": [2.0]}, "images/s")
    assert (rates["alternative"], rates["ratio"], rates["spread"]) == ("fast", 1.5, None)
    assert summarise({"ours": [3.0]}, "ms")["ratio"] is None


def test_the_spread_is_of_ratios_of_the_same_round() -> None:
    ours = [1.0, 2.0, 4.0, 8.0]
    assert spread_of(ours, [3 * t for t in ours], "ms") == (3.0, 3.0)
    assert spread_of([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], "ms") == (2.0, 4.0)


def test_targets() -> None:
    assert row("a").met
    assert row("a", ratio=1.196).met, "as the page says it: 1.20"
    assert row("a", ratio=1.19).met is False
    assert row("a", target=None).met is None


def test_a_new_row_takes_the_place_of_the_old_one_of_the_same_machine() -> None:
    old = [row("a"), row("b"), row("a", machine="another")]
    rows = merge(old, [row("a", ours=1.0), row("c", table="second"), row("d")])
    assert [(r.name, r.machine, r.ours) for r in rows] == [
        ("a", "a machine", 1.0),
        ("b", "a machine", 2.0),
        ("a", "another", 2.0),
        ("d", "a machine", 2.0),
        ("c", "a machine", 2.0),
    ]


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = [row("a", spread=(1.0, 2.0)), row("b", theirs=None, ratio=None)]
    write_rows(tmp_path, rows)
    again = read_rows(tmp_path)
    assert [r.key for r in again] == [r.key for r in rows]
    assert list(again[0].spread or ()) == [1.0, 2.0]


def test_the_page_says_what_is_missed_and_why() -> None:
    gaps = read_gaps(
        "# Notes\n\n## Gaps\n\nWhat for.\n\n- `slow one`: because\n  of this.\n- `other`: no.\n\n## More\n"
    )
    assert gaps == {"slow one": "because of this.", "other": "no."}
    page = to_markdown([row("quick one"), row("slow one, 224", ratio=1.1, spread=(1.0, 1.2))], gaps, {})
    assert "1 of 2 targets are met" in page
    assert "| slow one, 224 | ms | 2 | 3 | 1.10 [1.00, 1.20] | 1.2 | **no** |" in page
    assert "- slow one: because of this." in page
    assert "other: no" not in page


def test_the_page_and_its_plots_are_files(tmp_path: Path) -> None:
    curves = [row(f"side {x}", table="growth", x=x, series="S", ours=x) for x in (1.0, 2.0)]
    write_rows(tmp_path, [row("a", spread=(1.0, 2.0)), *curves])
    write_report(tmp_path)
    page = (tmp_path / "RESULTS.md").read_text()
    for name in ("plots/table-cpu.svg", "plots/growth-cpu.svg"):
        assert f"({name})" in page
        assert (tmp_path / name).read_text().startswith("<?xml")
    before = (tmp_path / "plots/table-cpu.svg").read_bytes()
    write_report(tmp_path)
    assert (tmp_path / "plots/table-cpu.svg").read_bytes() == before, "the same rows, the same picture"


def test_all_take_turns_after_one_round_that_does_not_count() -> None:
    order: list[str] = []
    ticks = iter(range(1000))
    times = time_in_turns(
        {"ours": partial(order.append, "a"), "theirs": partial(order.append, "b")},
        device=CPU,
        seconds=0.0,
        rounds=(3, 9),
        before=lambda index: order.append(str(index)),
        clock=lambda: float(next(ticks)),
    )
    assert times == {"ours": [1.0] * 3, "theirs": [1.0] * 3}
    calls = [entry for entry in order if entry in "ab"]
    assert calls in (list("abbaabba"), list("baabbaab"))
    assert all(entry in "ab" for before, entry in pairwise(order) if before not in ("a", "b"))


def make_array(megabytes: int) -> Callable[[], object]:
    return lambda: torch.ones(megabytes * 1_000_000 // 4)


def test_peak_memory_here() -> None:
    call = make_array(50)
    with PeakMemory() as memory:
        call()
    assert 45e6 < memory.bytes < 80e6


@pytest.mark.slow
def test_peak_memory_in_a_process_of_its_own() -> None:
    assert 45e6 < peak_memory(partial(make_array, 50), CPU, 1) < 80e6


def test_points_too_slow_or_not_wanted_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def fail() -> Callable[[], object]:
        raise AssertionError("is not built")

    chosen = bench(tmp_path, only=["small"])
    assert chosen.time("large one", {"ours": fail}, table="t") is None
    assert chosen.time("small one", {"ours": fail}, table="t", expected_s=21.0) is None
    assert "small one: left out, 21 s a call" in capsys.readouterr().out


def test_rows_are_kept_at_once_and_known_later(tmp_path: Path) -> None:
    first = bench(tmp_path)
    kept = first.time("a", {"ours": lambda: int, "theirs": lambda: int}, table="t", target=1.0, items=4)
    assert kept is not None
    assert kept.unit == "images/s"
    assert [r.key for r in read_rows(tmp_path)] == [kept.key]
    first.record("b", {"ours": [2.0], "limit": [4.0]}, table="t", unit="GB", target=1.0)
    again = bench(tmp_path, new=True)
    assert not again.wants("a")
    found = again.known("b")
    assert found is not None
    assert (found.ratio, found.alternative) == (2.0, "limit")


def test_a_row_says_where_it_comes_from() -> None:
    import socket

    assert "2 threads" in describe_machine(CPU, 2)
    assert socket.gethostname() not in describe_machine(CPU, 2)
    assert torch.__version__.startswith(versions()["torch"])


def test_the_command_lists_what_there_is(capsys: pytest.CaptureFixture) -> None:
    main([])
    listed = capsys.readouterr().out
    assert all(name in listed for name in find_benchmarks())
    with pytest.raises(SystemExit):
        main(["nonsense"])
    assert "no benchmark nonsense" in capsys.readouterr().err
