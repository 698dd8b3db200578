"""The pictures of the quick start: plain functions from numbers and images to PNG files.

Nothing here trains or evaluates. Colours mean the same everywhere: grey is the random backbone, blue the trained one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

RANDOM, TRAINED, PIXELS = "#9aa5b1", "#1f6feb", "#d9a441"
_MUTED, _GOOD, _BAD = "#57606a", "#2da44e", "#e5534b"
_LOSSES = {
    "dino_global_crops_loss": "DINO, global crops",
    "dino_local_crops_loss": "DINO, local crops",
    "ibot_loss": "iBOT, masked patches",
}


def draw_samples(path: Path, examples: Mapping[str, Sequence[Path]], columns: int = 5) -> None:
    """A few images (files) of each class in a row, below the name of the class."""
    figure, axes = _grid(-(-len(examples) // columns), columns, cell=(1.9, 0.75))
    for one, (name, images) in zip(axes.flat, examples.items(), strict=False):
        one.imshow(_side_by_side(images), interpolation="nearest")
        one.set_title(name, fontsize=9, color=_MUTED, loc="left", pad=3)
    _save(figure, path)


def draw_neighbours(path: Path, queries: Sequence[Path], found: Mapping[str, Sequence[Sequence[Path]]]) -> None:
    """Per query image (a row) its nearest training images, in one block of columns per backbone; all in grey.

    Frames tell whether a neighbour is in the same folder, that is of the same class, as the query.
    """
    n = max(len(rows[0]) for rows in found.values())
    # The automatic layout would make a column as wide as the title of its block.
    figure, axes = _grid(len(queries), 1 + (n + 1) * len(found), cell=(0.62, 0.62), layout=None)
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=0.93, wspace=0.09, hspace=0.09)
    for line, query in zip(axes, queries, strict=True):
        line[0].imshow(_read(query, grey=True), interpolation="nearest")
    axes[0, 0].set_title("held out", fontsize=9)
    for block, (name, rows) in enumerate(found.items()):
        first = 2 + block * (n + 1)  # a column stays empty before each block
        axes[0, first].set_title(f"nearest for the {name}", fontsize=9, loc="left")
        for line, query, images in zip(axes, queries, rows, strict=True):
            for one, image in zip(line[first : first + n], images, strict=True):
                one.imshow(_read(image, grey=True), interpolation="nearest")
                one.spines[:].set(visible=True, linewidth=2.2, color=_GOOD if _same_class(image, query) else _BAD)
    _save(figure, path)


def _same_class(image: Path, other: Path) -> bool:
    return image.parent.name == other.parent.name


def _read(path: Path, *, grey: bool = False) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("L" if grey else "RGB").convert("RGB"))


def _side_by_side(paths: Sequence[Path], gap: int = 3) -> np.ndarray:
    images = [np.pad(_read(path), ((0, 0), (0, gap), (0, 0)), constant_values=255) for path in paths]
    return np.concatenate(images, axis=1)[:, :-gap]


def draw_losses(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Losses over iterations; `rows` are those of `training_metrics.json`."""
    iterations = [row["iteration"] for row in rows]
    figure, axes = _plots(2, size=(8.6, 3.1))
    axes[0].plot(iterations, [row["total_loss"] for row in rows], color=TRAINED, linewidth=1.8)
    axes[0].set_title("Total loss")
    for (key, label), shade in zip(_LOSSES.items(), ("#0b3d91", "#1f6feb", "#79b8ff"), strict=True):
        axes[1].plot(iterations, [row[key] for row in rows], color=shade, linewidth=1.6, label=label)
    axes[1].set_title("Its parts")
    axes[1].legend(frameon=False, fontsize=8)
    for one in axes:
        one.set_xlabel("iteration")
    _save(figure, path)


def draw_accuracies(path: Path, bars: Mapping[str, float], course: Mapping[int, float], chance: float) -> None:
    """Bars before and after, and the accuracy [%] of the exports made on the way.

    Args:
        path: of the PNG.
        bars: accuracy by name, in the order pixels, random, trained.
        course: accuracy by number of iterations trained, starting with 0.
        chance: accuracy of guessing.
    """
    figure, (left, right) = _plots(2, size=(8.6, 3.1), ratios=(1.15, 1))
    drawn = left.bar(list(bars), list(bars.values()), color=[PIXELS, RANDOM, TRAINED], width=0.62)
    left.bar_label(drawn, fmt="%.1f %%", fontsize=10, padding=2)
    left.set_title("Held-out pictures in the right folder")
    right.plot(list(course), list(course.values()), color=TRAINED, marker="o", linewidth=1.8)
    right.set_title("The backbone while it trains")
    right.set_xlabel("iteration")
    top = max(*bars.values(), *course.values()) * 1.18
    for one in (left, right):
        one.set_ylim(0, top)
        one.axhline(chance, color=_MUTED, linewidth=0.9, linestyle=":")
        one.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
    right.annotate("guessing", (0, chance), xytext=(2, 3), textcoords="offset points", fontsize=8, color=_MUTED)
    _save(figure, path)


class MapRow(NamedTuple):
    """A photograph and what a backbone makes of it.

    Attributes:
        caption: stands at the left.
        picture: RGB, PIL or array `[H, W, 3]`.
        maps: one per column, colours `[h, w, 3]` or values `[h, w]` from 0 to 1; drawn at the size of the picture.
        query: a place (x, y) in the picture to mark [pixels].
    """

    caption: str
    picture: Any
    maps: Sequence[np.ndarray]
    query: tuple[float, float] | None = None


def draw_maps(path: Path, rows: Sequence[MapRow], titles: Sequence[str]) -> None:
    """A row per photograph; `titles` are those of the columns of maps."""
    pictures = [np.asarray(row.picture) for row in rows]
    aspect = max(picture.shape[1] / picture.shape[0] for picture in pictures)
    figure, axes = _grid(len(rows), 1 + len(titles), cell=(2.3 * aspect, 2.3))
    for row, picture, line in zip(rows, pictures, axes, strict=True):
        extent = (0, picture.shape[1], picture.shape[0], 0)
        line[0].imshow(picture, extent=extent)
        line[0].set_ylabel(row.caption, fontsize=11, color=_MUTED)
        for one, values in zip(line[1:], row.maps, strict=True):
            one.imshow(values, cmap="magma", vmin=0, vmax=1, interpolation="nearest", extent=extent)
        if row.query is not None:
            for one in line:
                _mark(one, *row.query)
    for one, title in zip(axes[0], ["photograph", *titles], strict=True):
        one.set_title(title, fontsize=12)
    _save(figure, path)


def _mark(axes: Any, x: float, y: float) -> None:
    for colour, width in (("white", 3.4), ("#d1242f", 1.6)):
        axes.plot(x, y, "o", markersize=10, markerfacecolor="none", color=colour, markeredgewidth=width)


def pca_colours(features: Tensor) -> np.ndarray:
    """Patch features `[D, h, w]` as colours `[h, w, 3]` from 0 to 1: their first three principal components.

    Similar colours mean similar features within the image; the colours themselves have no meaning. Each component is
    stretched between its 2nd and 98th percentile, and its sign chosen so that its distribution leans to the right.
    """
    _, height, width = features.shape
    tokens = features.float().flatten(1).T  # [P, D]
    tokens = tokens - tokens.mean(dim=0)
    _, _, directions = torch.linalg.svd(tokens, full_matrices=False)
    components = tokens @ directions[:3].T  # [P, 3]
    components = components * torch.where((components**3).sum(dim=0) < 0, -1.0, 1.0)
    low, high = torch.quantile(components, torch.tensor([0.02, 0.98]), dim=0)
    scaled = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return scaled.reshape(height, width, 3).numpy()


def similarity_map(features: Tensor, x: float, y: float) -> np.ndarray:
    """Cosine similarity of every patch with one of them: features `[D, h, w]` to `[h, w]` from 0 to 1.

    Stretched from the lowest cosine of the image to 1, since all features of a small network have much in common.

    Args:
        features: of the patches.
        x, y: the place of that patch, as parts of the width and of the height.
    """
    row, column = int(y * features.shape[1]), int(x * features.shape[2])
    directions = torch.nn.functional.normalize(features.float(), dim=0)
    cosines = torch.einsum("dhw,d->hw", directions, directions[:, row, column])
    lowest = cosines.min()
    return ((cosines - lowest) / (1 - lowest).clamp(min=1e-12)).clamp(0, 1).numpy()


def _plots(columns: int, *, size: tuple[float, float], ratios: Sequence[float] | None = None) -> tuple[Any, Any]:
    """A figure with diagrams side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, columns, width_ratios=ratios)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=9, color=_MUTED)
        one.grid(axis="y", color="#eaeef2", linewidth=0.8)
        one.set_axisbelow(True)
    return figure, axes


def _grid(
    rows: int, columns: int, *, cell: tuple[float, float], layout: Literal["constrained"] | None = "constrained"
) -> tuple[Any, Any]:
    """A figure with pictures, without axes; cells in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(cell[0] * columns + 0.3, cell[1] * rows + 0.35), layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.set_xticks([])
        one.set_yticks([])
        one.spines[:].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=140, facecolor="white")
