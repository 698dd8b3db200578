"""Rows of iterations: each stands once, whatever was killed."""

import json
from pathlib import Path

from dinov3.logging.rows import add_row, drop_rows_from


def _rows(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_row_takes_the_place_of_the_same_and_later_ones(tmp_path: Path) -> None:
    file = tmp_path / "new" / "validation.jsonl"
    for iteration, value in ((10, 0.1), (20, 0.2), (30, 0.3), (20, 0.25)):
        add_row(file, iteration, {"AP": value})
    assert _rows(file) == [{"iteration": 10, "AP": 0.1}, {"iteration": 20, "AP": 0.25}]


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "validation.jsonl"
    add_row(file, 10, {"AP": 0.1})
    with open(file, "a") as rows:
        rows.write('{"iteration": 20, "A')
    drop_rows_from(file, 100)
    assert _rows(file) == [{"iteration": 10, "AP": 0.1}]
    drop_rows_from(tmp_path / "none.jsonl", 5)
    assert not (tmp_path / "none.jsonl").exists()
