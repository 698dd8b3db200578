"""Tables of results as files: types, round trips, formats, errors."""

import io
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dinov3.eval import results
from dinov3.eval.results import FileFormat, Table


def test_columns_have_one_type() -> None:
    table = results.make({"whole": [1.0, 2.0], "part": [1, 2.5], "text": ["a", 3], "flag": [True, False]})
    assert table.columns == {"whole": [1, 2], "part": [1.0, 2.5], "text": ["a", "3"], "flag": ["True", "False"]}
    assert isinstance(table.columns["whole"][0], int)
    assert isinstance(table.columns["part"][0], float)


def test_strings_are_one_row_not_columns_of_characters() -> None:
    assert results.make({"best": "abc", "other": "xy"}).rows() == [{"best": "abc", "other": "xy"}]


@pytest.mark.parametrize("extension", ["csv", "jsonl", "yaml"])
def test_what_is_written_is_read_back(extension: str, tmp_path: Path) -> None:
    table = results.make({"n": [3, 4], "x": [0.25, 1e-3], "s": ['with "quotes", and comma', "ü/n"]})
    path = tmp_path / f"t.{extension}"
    results.save(table, path)
    assert results.load(path) == table


def test_nan_is_an_empty_csv_field_and_null_in_json(tmp_path: Path) -> None:
    table = results.make({"a": [1.5, math.nan], "b": ["x", "y"]})
    results.save(table, tmp_path / "t.csv")
    results.save(table, tmp_path / "t.jsonl")
    assert (tmp_path / "t.csv").read_text() == "a,b\n1.5,x\n,y\n"
    assert (tmp_path / "t.jsonl").read_text() == '{"a":1.5,"b":"x"}\n{"a":null,"b":"y"}\n'
    for extension in ("csv", "jsonl"):
        loaded = results.load(tmp_path / f"t.{extension}").columns["a"]
        assert loaded[0] == 1.5
        assert math.isnan(loaded[1])


def test_json_lines_keep_ten_decimals() -> None:
    out = io.StringIO()
    results.save(results.make({"a": 1 / 3, "b": 2e-10, "c": 83.0, "d": [0.5][0]}), out, FileFormat.JSONL)
    assert out.getvalue() == '{"a":0.3333333333,"b":0.0000000002,"c":83,"d":0.5}\n'


def test_stacking_fills_missing_columns() -> None:
    table = results.vstack(results.make({"a": 1, "b": "x"}), results.make({"a": 2, "c": 0.5}))
    assert table.columns["a"] == [1, 2]
    assert table.columns["b"] == ["x", ""]
    assert math.isnan(table.columns["c"][0])
    assert table.columns["c"][1] == 0.5
    assert len(table) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: results.save_from_dict({"a": 1}, p / "t.txt"), "no extension of a table file; known: .csv"),
        (lambda p: results.load(io.StringIO("a\n1\n")), "pass file_format"),
        (lambda p: Table({"a": [1], "b": [1, 2]}), "equal lengths, got {'a': 1, 'b': 2}"),
    ],
)
def test_errors_say_what_to_do(call: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_excel_sheets_or_the_package_to_install(tmp_path: Path) -> None:
    table = results.make({"a": [1, 2], "b": ["x", "y"]})
    if find_spec("openpyxl") is None:
        with pytest.raises(ImportError, match="pip install openpyxl"):
            results.save(table, tmp_path / "t.excel")
        return
    results.save_collection({"one": table, "two": results.make({"z": 0.5})}, tmp_path / "t.excel")
    sheets = results.load_collection(tmp_path / "t.excel")
    assert list(sheets) == ["one", "two"]
    assert sheets["one"] == table
    assert results.load(tmp_path / "t.excel") == table
