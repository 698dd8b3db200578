"""RESULTS.md and its plots, made from results.json and the explanations in NOTES.md."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.frame.results import Row, read_rows
from dinov3.utils.files import atomically

HEADER = """# Results

Made by `python -m benchmarks` (this page: `python -m benchmarks report`); do not edit. Ours and the alternatives take
turns in one process; memory is the highest resident size (on an accelerator: allocated by torch) of one call beyond the
state before it, each side in a fresh process. Values are medians; a ratio above 1 means that ours is better; in
brackets the quartiles of the ratio over the rounds. Points whose call takes more than 20 s are left out. What was
expected of each change and what came of it is in [NOTES.md](NOTES.md).
"""


def write_report(folder: Path) -> None:
    """Write `RESULTS.md`, and a plot for each table into `plots/`."""
    rows = read_rows(folder)
    notes = folder / "NOTES.md"
    gaps = read_gaps(notes.read_text("utf-8")) if notes.exists() else {}
    pictures = {}
    for table, members in tables(rows).items():
        name = f"plots/{_slug(table)}.svg"
        if draw(folder / name, table, members):
            pictures[table] = name
    with atomically(folder / "RESULTS.md") as path:
        path.write_text(to_markdown(rows, gaps, pictures), encoding="utf-8")


def tables(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by table and machine; the title names the device."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(f"{row.table} ({row.device})", []).append(row)
    return found


def read_gaps(notes: str) -> dict[str, str]:
    """Why targets are missed: the lines "- `part of a row's name`: explanation" under "## Gaps"."""
    section = re.search(r"^## Gaps\n(.*?)(?=^## |\Z)", notes, re.MULTILINE | re.DOTALL)
    if section is None:
        return {}
    items = re.findall(r"^- `([^`]+)`: (.*?)(?=^- |\Z)", section[1], re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in items}


def to_markdown(rows: Sequence[Row], gaps: dict[str, str], pictures: dict[str, str]) -> str:
    """The whole page."""
    parts = [HEADER, _overview(rows)]
    for table, members in tables(rows).items():
        parts.append(f"## {table}\n")
        for where in dict.fromkeys(row.machine for row in members):
            here = [row for row in members if row.machine == where]
            commands = ", ".join(f"`{command}`" for command in dict.fromkeys(row.command for row in here))
            libraries = ", ".join(dict.fromkeys(_versions(row) for row in here))
            parts.append(f"{where}. {libraries}.\n\n{commands}\n")
            parts.append(_table(here))
            parts.extend(_explanations(here, gaps))
        if table in pictures:
            parts.append(f"![{table}]({pictures[table]})\n")
    return "\n".join(parts)


def _overview(rows: Sequence[Row]) -> str:
    wanted = [row for row in rows if row.met is not None]
    met = sum(bool(row.met) for row in wanted)
    lines = [f"{met} of {len(wanted)} targets are met.\n", "| table | targets | met | smallest ratio over its target |"]
    lines.append("|---|---|---|---|")
    for table, members in tables(wanted).items():
        worst = min(members, key=lambda row: (row.ratio or 0.0) / (row.target or 1.0))
        cell = f"{worst.ratio:.2f} / {worst.target:g}: {worst.name}"
        lines.append(f"| {table} | {len(members)} | {sum(bool(row.met) for row in members)} | {cell} |")
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> str:
    others = list(dict.fromkeys(name for row in rows for name in row.others))
    head = ["", "unit", "ours", *others, "ratio", "target", "met"]
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 3) + "---|"]
    for row in rows:
        values = [_number(row.others[name]) if name in row.others else "" for name in others]
        spread = "" if row.spread is None else " [{:.2f}, {:.2f}]".format(*row.spread)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}{spread}"
        target = "" if row.target is None else f"{row.target:g}"
        met = "" if row.met is None else ("yes" if row.met else "**no**")
        lines.append(f"| {' | '.join([row.name, row.unit, _number(row.ours), *values, ratio, target, met])} |")
    return "\n".join(lines) + "\n"


def _explanations(rows: Sequence[Row], gaps: dict[str, str]) -> list[str]:
    missed = [row.name for row in rows if row.met is False]
    return [f"- {name}: {text}\n" for name, text in gaps.items() if any(name in row for row in missed)]


def _versions(row: Row) -> str:
    return ", ".join(f"{name} {number}" for name, number in row.versions.items())


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _slug(table: str) -> str:
    return re.sub(r"\W+", "-", table.lower()).strip("-")


def draw(path: Path, title: str, rows: Sequence[Row]) -> bool:
    """Lines over `x` if the rows have one, else bars of the ratios; False if there is nothing to draw."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    curves = [row for row in rows if row.x is not None]
    bars = [row for row in rows if row.ratio is not None]
    if not curves and not bars:
        return False
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "benchmarks", "font.size": 8}):
        figure = _draw_curves(plt, curves) if curves else _draw_bars(plt, bars)
        figure.suptitle(title, fontsize=9)
        with atomically(path) as temporary:
            figure.savefig(temporary, metadata={"Date": None})
        plt.close(figure)
    return True


def _draw_bars(plt: Any, rows: Sequence[Row]) -> Any:
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.18 * len(rows)), layout="constrained")
    places = range(len(rows))
    ratios = [row.ratio or 0.0 for row in rows]
    colours = ["tab:red" if row.met is False else "tab:blue" for row in rows]
    axes.barh(places, [ratio - 1 for ratio in ratios], left=1, color=colours, height=0.6)
    for place, row in zip(places, rows, strict=True):
        if row.spread is not None:
            axes.plot(row.spread, [place, place], color="black", linewidth=0.8)
        if row.target is not None:
            axes.plot(row.target, place, marker="|", color="tab:orange", markersize=8)
    axes.axvline(1, color="black", linewidth=0.5)
    axes.set(yticks=places, yticklabels=[row.name for row in rows], xscale="log")
    axes.set_xlabel("times better than the best alternative (orange: wanted; black: quartiles)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.invert_yaxis()
    return figure


def _draw_curves(plt: Any, rows: Sequence[Row]) -> Any:
    """One panel for each unit; solid ours, dotted the best alternative."""
    units = list(dict.fromkeys(row.unit for row in rows))
    figure, panels = plt.subplots(1, len(units), figsize=(5 * len(units), 4), layout="constrained", squeeze=False)
    for unit, axes in zip(units, panels[0], strict=True):
        of_unit = [row for row in rows if row.unit == unit]
        for index, series in enumerate(dict.fromkeys(row.series for row in of_unit)):
            points = sorted((row for row in of_unit if row.series == series), key=lambda row: row.x or 0)
            places, colour = [row.x for row in points], f"C{index}"
            axes.plot(places, [row.ours for row in points], "o-", color=colour, markersize=3, label=series)
            if all(row.theirs is not None for row in points):
                axes.plot(places, [row.theirs for row in points], ":", color=colour, linewidth=1)
        axes.set(xscale="log", yscale="log", ylabel=unit)
        axes.legend(fontsize=6)
    return figure
