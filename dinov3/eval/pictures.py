"""Pictures of results: colours for classes and values, and panels side by side with a legend or a colour bar.

Images are uint8 arrays [H, W, 3] throughout. What is drawn belongs to the tasks.
"""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED_COLOUR = (255, 255, 255)
_GOLDEN_RATIO = 0.618033988749895
_FONT_SIZE = 8


@dataclass(frozen=True)
class ColourBar:
    """A scale beside panels.

    Attributes:
        low, high: values at its ends.
        label: what they are, with the unit.
        colour_map: of matplotlib, as given to `colour_values`.
    """

    low: float
    high: float
    label: str
    colour_map: str = "turbo"


def spread_indices(n_samples: int, n: int) -> list[int]:
    """Which samples of a data set to show: `n` from all over it (fewer, if it is shorter), with the first and last."""
    return np.unique(np.linspace(0, n_samples - 1, n).astype(int)).tolist() if n_samples else []


def palette(n: int) -> np.ndarray:
    """`n` colours that neighbours in the list are easily told apart by; the same for every call: uint8 [n, 3].

    Hues step by the golden ratio, so that no two of the first dozens are alike, in three degrees of brightness.
    """
    colours = [
        colorsys.hsv_to_rgb((0.58 + i * _GOLDEN_RATIO) % 1.0, (0.75, 0.55, 0.9)[i % 3], (0.9, 0.75, 0.6)[i // 3 % 3])
        for i in range(n)
    ]
    return (np.array(colours).reshape(n, 3) * 255).round().astype(np.uint8)


def colour_labels(
    labels: np.ndarray | Tensor, colours: np.ndarray, *, ignored: Sequence[int] = IGNORED_COLOUR
) -> np.ndarray:
    """A label map in colours, uint8 [H, W, 3].

    Args:
        labels: class indices [H, W] or [1, H, W].
        colours: uint8 [K, 3].
        ignored: colour of labels that are no class (255, and any outside 0 to K-1).
    """
    indices = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels).astype(np.int64)
    indices = indices.reshape(indices.shape[-2:])
    table = np.concatenate([colours, np.array([ignored], dtype=np.uint8)])
    return table[np.where((indices >= 0) & (indices < len(colours)), indices, len(colours))]


def colour_values(
    values: np.ndarray | Tensor,
    low: float,
    high: float,
    colour_map: str = "turbo",
    *,
    invalid: Sequence[int] = IGNORED_COLOUR,
) -> np.ndarray:
    """A map of numbers in colours, uint8 [H, W, 3].

    Args:
        values: [H, W] or [1, H, W].
        low, high: values that get the first and the last colour; others beyond get the same.
        colour_map: of matplotlib.
        invalid: colour of NaN and infinite values.
    """
    import matplotlib

    array = np.asarray(values.detach().float().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    array = array.reshape(array.shape[-2:])
    finite = np.isfinite(array)
    scaled = (np.where(finite, array, low) - low) / max(high - low, 1e-12)
    rgb = (matplotlib.colormaps[colour_map](scaled.clip(0, 1))[..., :3] * 255).round().astype(np.uint8)
    rgb[~finite] = invalid
    return rgb


def as_picture(image: Any, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> np.ndarray:
    """Any image as uint8 [H, W, 3].

    Args:
        image: Pillow image, array [H, W, 3], or tensor [3, H, W] (uint8, or in [0, 1], or normalised with
            `mean` and `std`, whatever their scale, if its values times `std` plus `mean` go up to 1 or 255).
        mean, std: of the normalisation to undo.
    """
    if not isinstance(image, Tensor):
        array = np.asarray(image)
        return np.repeat(array[..., None], 3, axis=-1) if array.ndim == 2 else array[..., :3]
    pixels = image.detach().cpu()
    if pixels.dtype != torch.uint8:
        pixels = pixels.float()
        scale = 255.0
        if mean is not None and std is not None:
            pixels = pixels * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
            scale = 1.0 if max(mean) > 1 else 255.0
        pixels = (pixels * scale).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 0).numpy()


def overlay(image: np.ndarray, colours: np.ndarray, opacity: float = 0.55) -> np.ndarray:
    """Colours over an image of the same size, uint8 [H, W, 3]."""
    if image.shape != colours.shape:
        raise ValueError(f"image and colours must have one shape, got {image.shape} and {colours.shape}")
    mixed = image.astype(np.float32) * (1 - opacity) + colours.astype(np.float32) * opacity
    return mixed.round().astype(np.uint8)


def draw_boxes(
    image: np.ndarray,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[str] | None = None,
    colours: Sequence[Sequence[int]] | None = None,
) -> np.ndarray:
    """Boxes over an image, each with its label above it (inside, where there is no room), uint8 [H, W, 3].

    Args:
        image: uint8 [H, W, 3].
        boxes: (left, top, right, bottom) in pixels.
        labels: text of each; None: none.
        colours: of each; None: those of `palette`.
    """
    from PIL import Image, ImageDraw

    canvas = Image.fromarray(np.ascontiguousarray(image))
    draw = ImageDraw.Draw(canvas)
    side = min(image.shape[:2])
    width, font_size = max(round(side / 200), 1), max(side / 25, 10)
    shades = palette(len(boxes)).tolist() if colours is None else colours
    for i, (box, colour) in enumerate(zip(boxes, shades, strict=True)):
        fill = (int(colour[0]), int(colour[1]), int(colour[2]))
        left, top, right, bottom = (float(value) for value in box)
        draw.rectangle((left, top, max(right, left), max(bottom, top)), outline=fill, width=width)
        if labels is not None:
            _, _, text_width, text_height = draw.textbbox((0, 0), labels[i], font_size=font_size)
            x = max(min(left, canvas.width - text_width), 0.0)
            y = top - text_height if top >= text_height else top
            draw.rectangle((x, y, x + text_width, y + text_height), fill=fill)
            ink = (0, 0, 0) if sum(fill) > 380 else (255, 255, 255)
            draw.text((x, y), labels[i], fill=ink, font_size=font_size)
    return np.asarray(canvas)


def save_panels(
    path: Path,
    panels: Mapping[str, np.ndarray],
    *,
    legend: Mapping[str, Sequence[int]] | None = None,
    colour_bar: ColourBar | None = None,
    title: str | None = None,
    height_px: int = 360,
) -> None:
    """Images side by side under their names, with a legend below or a colour bar on the right, as a PNG file.

    Args:
        path: the file; its folder is made.
        panels: name -> uint8 [H, W, 3]; all are drawn equally high.
        legend: name -> colour.
        colour_bar: for colours that stand for values.
        title: above all.
        height_px: of the panels.
    """
    from matplotlib.figure import Figure

    dpi = 100
    widths = [image.shape[1] / image.shape[0] for image in panels.values()]
    height = height_px / dpi
    columns = max(int(sum(widths) * height / 1.5), 1)
    rows = 0 if not legend else -(-len(legend) // columns)
    bar = 0.3 if colour_bar else 0.0  # parts of a panel's height
    figure = Figure(
        figsize=((sum(widths) + bar) * height + 0.2, height + 0.35 + 0.2 * rows + (0.25 if title else 0)),
        dpi=dpi,
        layout="constrained",
    )
    ratios = [*widths, 0.06] if colour_bar else widths
    axes = figure.subplots(1, len(ratios), squeeze=False, gridspec_kw={"width_ratios": ratios})[0]
    for one, (name, image) in zip(axes, panels.items(), strict=False):
        one.imshow(image, interpolation="nearest")
        one.set_title(name, fontsize=_FONT_SIZE + 1)
        one.set_axis_off()
    if colour_bar:
        _draw_colour_bar(axes[-1], colour_bar)
    if legend:
        _draw_legend(figure, legend, columns)
    if title:
        figure.suptitle(title, fontsize=_FONT_SIZE + 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_colour_bar(axis: Any, bar: ColourBar) -> None:
    ramp = np.linspace(1, 0, 256)[:, None]
    axis.imshow(ramp, aspect="auto", cmap=bar.colour_map, extent=(0, 1, bar.low, bar.high), vmin=0, vmax=1)
    axis.set_xticks([])
    axis.yaxis.tick_right()
    axis.tick_params(labelsize=_FONT_SIZE)
    axis.yaxis.set_label_position("right")
    axis.set_ylabel(bar.label, fontsize=_FONT_SIZE)


def _draw_legend(figure: Any, legend: Mapping[str, Sequence[int]], columns: int) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=f"#{bytes(map(int, colour)).hex()}", label=name) for name, colour in legend.items()]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(columns, len(handles)),
        fontsize=_FONT_SIZE,
        frameon=False,
    )
