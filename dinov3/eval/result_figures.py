"""Results of classification evaluations for people: a Markdown table and plots, in a folder beside the table file.

Programs read the CSV and JSON files; nothing reads these.
"""

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3 import distributed
from dinov3.eval.metrics.confusion import confusion_counts

logger = logging.getLogger("dinov3")

_MAX_NAMED, _MAX_DRAWN = 30, 2000  # classes of a confusion table
_MAX_NAME_LENGTH = 18
_N_CONFUSIONS = 20

Row = Mapping[str, Any]


class ResultFigures:
    """Writes the figures of one evaluation to `<output_dir>/<name>/` (main process only).

    Args:
        output_dir: of the evaluation.
        name: such as `results-knn`.
    """

    def __init__(self, output_dir: str | Path, name: str) -> None:
        self.folder = Path(output_dir or ".") / name
        self._sections: list[str] = []

    def add_table(self, title: str, rows: Sequence[Row]) -> None:
        """A table of the Markdown page; numbers that aren't whole are given with two decimals."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        lines += ["| " + " | ".join(_cell(row.get(name, "")) for name in names) + " |" for row in rows]
        self._sections.append("\n".join([f"## {title}", "", *lines, ""]))

    def add_accuracies(
        self,
        file: str,
        title: str,
        lines: Mapping[str, Mapping[float, float]],
        *,
        x_label: str,
        chosen: float | None = None,
    ) -> None:
        """A plot of percentages over a logarithmic axis.

        Args:
            file: name of the picture.
            title: above it.
            lines: by label: x -> percent.
            x_label: what x is.
            chosen: an x to mark.
        """
        self._draw(file, title, lambda figure: _draw_lines(figure, title, lines, x_label, chosen))

    def add_confusion(
        self, file: str, title: str, pairs: Tensor, num_classes: int, class_names: Sequence[str] = ()
    ) -> None:
        """A plot of the confusion table, row by row in percent, and a list of the most frequent confusions.

        Args:
            file: name of the picture.
            title: above it.
            pairs: of `ClassPairs`; nothing is drawn without any.
            num_classes: C.
            class_names: C names; default: numbers.
        """
        if not len(pairs):
            return
        names = list(class_names) if len(class_names) == num_classes else [str(i) for i in range(num_classes)]
        if num_classes <= _MAX_DRAWN:
            counts = confusion_counts(pairs, num_classes)
            self._draw(file, title, lambda figure: _draw_confusion(figure, title, counts, names))
        self.add_table(f"{title}: most frequent confusions", _confusions(pairs, num_classes, names))

    def write(self) -> None:
        """Write the page `README.md` with all that was added."""
        if distributed.is_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "README.md").write_text("\n".join(self._sections), encoding="utf-8")
            logger.info("tables and plots: %s", self.folder)

    def _draw(self, file: str, title: str, draw: Any) -> None:
        if not distributed.is_main_process():
            return
        if find_spec("matplotlib") is None:
            logger.info("%s isn't drawn: matplotlib is missing", file)
            return
        from matplotlib.figure import Figure

        figure = Figure(dpi=110, layout="constrained")
        draw(figure)
        self.folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.folder / file)
        self._sections.append(f"![{title}]({file})\n")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3g}"
    return str(value).replace("|", "\\|")


def _draw_lines(
    figure: Any, title: str, lines: Mapping[str, Mapping[float, float]], x_label: str, chosen: float | None
) -> None:
    figure.set_size_inches(6.4, 4.0)
    axis = figure.subplots()
    for label, points in lines.items():
        xs = sorted(points)
        axis.plot(xs, [points[x] for x in xs], marker="o", markersize=4, label=label)
    if chosen is not None:
        axis.axvline(chosen, color="0.5", linestyle=":", linewidth=1.2, label="chosen")
    axis.set_xscale("log")
    every = sorted({x for points in lines.values() for x in points})
    if len(every) <= 8:
        axis.set_xticks(every, [f"{x:g}" for x in every])
        axis.set_xticks([], minor=True)
    axis.set_xlabel(x_label)
    axis.set_ylabel("%")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _draw_confusion(figure: Any, title: str, counts: Tensor, names: Sequence[str]) -> None:
    n = len(names)
    side = min(max(3.2, 1.6 + 0.28 * n), 10.0)
    figure.set_size_inches(side + 1.0, side)
    axis = figure.subplots()
    totals = counts.sum(1, keepdim=True)
    percent = torch.where(totals > 0, 100.0 * counts / totals.clamp(min=1), torch.nan)
    picture = axis.imshow(percent.numpy(), cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(picture, ax=axis, label="% of the class", shrink=0.8)
    if n <= _MAX_NAMED:
        short = [name if len(name) <= _MAX_NAME_LENGTH else name[: _MAX_NAME_LENGTH - 1] + "…" for name in names]
        axis.set_xticks(range(n), short, rotation=90, fontsize=7)
        axis.set_yticks(range(n), short, fontsize=7)
    if n <= 12:
        for row in range(n):
            for column in range(n):
                value = percent[row, column].item()
                if value > 0:
                    colour = "white" if value < 60 else "black"
                    axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xlabel("guess")
    axis.set_ylabel("class")
    axis.set_title(title, fontsize=10)


def _confusions(pairs: Tensor, num_classes: int, names: Sequence[str]) -> list[Row]:
    classes, guesses = pairs // num_classes, pairs % num_classes
    totals = torch.bincount(classes, minlength=num_classes)
    found, counts = pairs[classes != guesses].unique(return_counts=True)
    rows: list[Row] = []
    for i in counts.argsort(descending=True, stable=True)[:_N_CONFUSIONS].tolist():
        pair, count = int(found[i]), int(counts[i])
        row, column = divmod(pair, num_classes)
        percent = 100.0 * count / int(totals[row])
        rows.append({"class": names[row], "taken for": names[column], "times": count, "% of the class": percent})
    return rows
