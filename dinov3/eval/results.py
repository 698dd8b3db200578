"""Tables of results as files: CSV, JSON lines, YAML, Excel. What `pandas` would write, without pandas.

A table has typed columns: all integers, all floats or all strings. Booleans become the strings `True` and `False`, and
a column of floats that are all whole numbers becomes integers (83.0 is written as 83).
"""

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any

Value = int | float | str


class FileFormat(Enum):
    """Formats of table files; the value is the file extension."""

    CSV = "csv"
    JSONL = "jsonl"
    EXCEL = "excel"
    YAML = "yaml"

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> "FileFormat":
        """The format that the extension of `path` stands for (`.xlsx` is Excel as well)."""
        extension = Path(path).suffix.removeprefix(".").lower()
        try:
            return cls("excel" if extension == "xlsx" else extension)
        except ValueError:
            known = ", ".join(f".{f.value}" for f in cls)
            raise ValueError(f"{str(path)!r} has no extension of a table file; known: {known}, .xlsx") from None


@dataclass(frozen=True)
class Table:
    """Columns of equal length, by name."""

    columns: Mapping[str, list[Value]]

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns must have equal lengths, got {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def rows(self) -> list[dict[str, Value]]:
        """The table as one mapping per row."""
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*self.columns.values(), strict=True)]


def make(data: Mapping[str, Any]) -> Table:
    """A table of one column per key. If all values are lists they are the columns, otherwise each is the one row."""
    as_columns = bool(data) and all(isinstance(value, list | tuple) for value in data.values())
    return Table({str(name): _typed(value if as_columns else [value]) for name, value in data.items()})


def vstack(*tables: Table) -> Table:
    """All rows of the tables, in order; a column that a table lacks is NaN in its rows."""
    names = list(dict.fromkeys(name for table in tables for name in table.columns))
    missing: list[Value] = [math.nan]
    return Table({name: _typed([v for t in tables for v in t.columns.get(name, missing * len(t))]) for name in names})


def _typed(values: Sequence[Any]) -> list[Value]:
    """One column: integers if all numbers are whole, else floats if all are numbers, else strings."""
    values = [value.item() if hasattr(value, "item") else value for value in values]
    values = [math.nan if value is None else value for value in values]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return ["" if isinstance(value, float) and math.isnan(value) else str(value) for value in values]
    if all(float(value).is_integer() for value in values):
        return [int(value) for value in values]
    return [float(value) for value in values]


def save_from_dict(data: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write `make(data)` in the format of the extension.

    Raises:
        ValueError: the extension is not that of a table file.
    """
    save(make(data), path)


def save(table: Table, f: str | os.PathLike[str] | IO[Any], file_format: FileFormat | None = None) -> None:
    """Write a table to a path, or to an open file (binary for Excel, text otherwise).

    Args:
        table: what to write.
        f: path or file.
        file_format: needed for a file; default: by the extension of the path.
    """
    file_format = _format_of(f, file_format)
    if file_format is FileFormat.EXCEL:
        save_collection({"Sheet1": table}, f)
        return
    text = {FileFormat.CSV: _to_csv, FileFormat.JSONL: _to_json_lines, FileFormat.YAML: _to_yaml}[file_format](table)
    # No newline translation: the same bytes on every system.
    with open(f, "w", encoding="utf-8", newline="") if isinstance(f, str | os.PathLike) else nullcontext(f) as file:
        file.write(text)


def load(f: str | os.PathLike[str] | IO[Any], file_format: FileFormat | None = None) -> Table:
    """Read a table back; the arguments are those of `save`."""
    file_format = _format_of(f, file_format)
    if file_format is FileFormat.EXCEL:
        return next(iter(load_collection(f).values()))
    with open(f, encoding="utf-8", newline="") if isinstance(f, str | os.PathLike) else nullcontext(f) as file:
        text = file.read()
    read = {FileFormat.CSV: _from_csv, FileFormat.JSONL: _from_json_lines, FileFormat.YAML: _from_yaml}[file_format]
    return read(text)


def _format_of(f: str | os.PathLike[str] | IO[Any], file_format: FileFormat | None) -> FileFormat:
    if file_format is not None:
        return file_format
    if isinstance(f, str | os.PathLike):
        return FileFormat.of(f)
    raise ValueError("an open file has no extension to tell the format: pass file_format=FileFormat....")


def _to_csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(["" if _is_nan(v) else v for v in row.values()] for row in table.rows())
    return out.getvalue()


def _from_csv(text: str) -> Table:
    header, *rows = csv.reader(io.StringIO(text))
    columns = zip(*rows, strict=True) if rows else [()] * len(header)
    return Table({name: _typed(_parsed(column)) for name, column in zip(header, columns, strict=True)})


def _parsed(column: Sequence[str]) -> list[Any]:
    """Numbers if every field is one, or empty (NaN); else the strings."""
    try:
        return [float(field) if field else math.nan for field in column] if any(column) else list(column)
    except ValueError:
        return list(column)


def _to_json_lines(table: Table) -> str:
    lines = (",".join(f"{json.dumps(name)}:{_json(value)}" for name, value in row.items()) for row in table.rows())
    return "".join(f"{{{line}}}\n" for line in lines)


def _json(value: Value) -> str:
    if not isinstance(value, float):
        return json.dumps(value)
    if not math.isfinite(value):
        return "null"
    text = f"{value:.10f}".rstrip("0")  # ten decimals, as readers of these files expect
    return text + "0" if text.endswith(".") else text


def _from_json_lines(text: str) -> Table:
    rows = [json.loads(line) for line in text.splitlines() if line]
    return vstack(*(make(row) for row in rows))


def _to_yaml(table: Table) -> str:
    import yaml

    text: str = yaml.safe_dump(dict(enumerate(table.rows())), sort_keys=True)
    return text


def _from_yaml(text: str) -> Table:
    import yaml

    rows = yaml.safe_load(text) or {}
    return vstack(*(make(row) for _, row in sorted(rows.items())))


def save_collection(tables: Mapping[str, Table], f: str | os.PathLike[str] | IO[bytes]) -> None:
    """Write tables as the sheets of one Excel file."""
    workbook = _openpyxl().Workbook()
    workbook.remove(workbook.active)
    for name, table in tables.items():
        sheet = workbook.create_sheet(name)
        sheet.append(list(table.columns))
        for row in table.rows():
            sheet.append([None if _is_nan(v) else v for v in row.values()])
    workbook.save(f)


def load_collection(f: str | os.PathLike[str] | IO[bytes]) -> dict[str, Table]:
    """The sheets of an Excel file, by name."""
    with open(f, "rb") if isinstance(f, str | os.PathLike) else nullcontext(f) as file:  # by content, not by extension
        workbook = _openpyxl().load_workbook(file, read_only=True)
        tables = {}
        for sheet in workbook.worksheets:
            header, *rows = sheet.iter_rows(values_only=True)
            columns = zip(*rows, strict=True) if rows else [()] * len(header)
            tables[sheet.title] = Table({str(n): _typed(column) for n, column in zip(header, columns, strict=True)})
    return tables


def _openpyxl() -> Any:
    try:
        import openpyxl  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError("Excel files need the package openpyxl: pip install openpyxl, or write .csv") from error
    return openpyxl


def _is_nan(value: Value) -> bool:
    return isinstance(value, float) and math.isnan(value)
