"""Rows of results: what is kept of each point, how a ratio is made of the rounds, and the file that holds them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from dinov3.utils.files import atomically


@dataclass(frozen=True)
class Row:
    """One point. Values are in `unit`; units that end in "/s" are better when larger, all others when smaller."""

    name: str
    ours: float
    theirs: float | None
    """Of the best alternative; None if there is nothing to compare with."""
    alternative: str | None
    ratio: float | None
    """Above 1 ours is better."""
    target: float | None
    """The ratio that is wanted, if one is."""
    device: str
    """Type of the device: cpu, cuda, mps."""
    unit: str
    table: str
    spread: tuple[float, float] | None = None
    """Quartiles of the ratio over the rounds."""
    rounds: int = 1
    others: dict[str, float] = field(default_factory=dict)
    """All alternatives that were measured."""
    series: str | None = None
    x: float | None = None
    """Where the point stands on the horizontal axis of the table's plot, and the line it belongs to."""
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """Rows of equal key replace each other."""
        return self.name, self.device, self.machine

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        return None if self.target is None or self.ratio is None else round(self.ratio, 2) >= self.target


def better_is_larger(unit: str) -> bool:
    """Whether that is a rate."""
    return unit.endswith("/s")


def compare(ours: float, theirs: float, unit: str) -> float:
    """How many times better ours is."""
    return ours / theirs if better_is_larger(unit) else theirs / ours


def best_alternative(medians: dict[str, float], unit: str) -> str:
    """The name of the best value."""
    return (max if better_is_larger(unit) else min)(medians, key=lambda name: medians[name])


def spread_of(ours: Sequence[float], theirs: Sequence[float], unit: str) -> tuple[float, float] | None:
    """Quartiles of the ratios of the rounds; None with fewer than three of them."""
    ratios = [compare(a, b, unit) for a, b in zip(ours, theirs, strict=True)]
    if len(ratios) < 3:
        return None
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    return low, high


def summarise(values: Mapping[str, Sequence[float]], unit: str) -> dict[str, Any]:
    """Fields of a row from the values that "ours" and the alternatives had in each round."""
    medians = {name: median(v) for name, v in values.items()}
    ours = medians.pop("ours")
    if not medians:
        return {"ours": ours, "theirs": None, "alternative": None, "ratio": None, "rounds": len(values["ours"])}
    best = best_alternative(medians, unit)
    return {
        "ours": ours,
        "theirs": medians[best],
        "alternative": best,
        "ratio": compare(ours, medians[best], unit),
        "spread": spread_of(values["ours"], values[best], unit),
        "rounds": len(values["ours"]),
        "others": medians,
    }


def read_rows(folder: Path) -> list[Row]:
    """The rows of `results.json`, none if there is no such file."""
    path = folder / "results.json"
    if not path.exists():
        return []
    names = {f.name for f in fields(Row)}
    return [Row(**{key: row[key] for key in names if key in row}) for row in json.loads(path.read_text("utf-8"))]


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All rows; a new one stands where the old one of the same key stood, else at the end of its table."""
    rows = {row.key: row for row in old}
    for row in new:
        rows[row.key] = row
    tables = {row.table: None for row in rows.values()}
    return [row for table in tables for row in rows.values() if row.table == table]


def write_rows(folder: Path, rows: Iterable[Row]) -> None:
    """Write `results.json`, whole or not at all."""
    text = json.dumps([asdict(row) for row in rows], indent=1)
    with atomically(folder / "results.json") as path:
        path.write_text(text + "\n", encoding="utf-8")
