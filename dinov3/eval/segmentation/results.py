"""What a segmentation run leaves for people: a table of the classes, and pictures of image, truth and prediction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.eval.pictures import as_picture, colour_labels, overlay, palette, save_panels
from dinov3.eval.results import save_from_dict
from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.metrics import calculate_class_metrics, preprocess_nonzero_labels
from dinov3.eval.segmentation.views import ViewAverager

CLASS_TABLE = "results-per-class.csv"
PICTURES = "pictures"


def write_class_table(folder: Path, areas: Tensor, names: Sequence[str]) -> Path:
    """Write one row per class: IoU, accuracy, dice, precision and recall in percent, and pixels of the truth.

    Args:
        folder: receives `results-per-class.csv`.
        areas: [4, K], summed over all images.
        names: of the classes.
    """
    metrics = calculate_class_metrics(areas)
    columns: dict[str, list[Any]] = {"class": list(range(len(names))), "name": list(names)}
    for name, key in (("IoU", "mIoU"), ("acc", "acc"), ("dice", "dice"), ("precision", "precision")):
        columns[name] = [round(100 * value, 2) for value in metrics[key].tolist()]
    columns["pixels"] = areas[3].tolist()
    folder.mkdir(parents=True, exist_ok=True)
    save_from_dict(columns, folder / CLASS_TABLE)
    return folder / CLASS_TABLE


def draw_samples(
    folder: Path, dataset: Any, scores_of: ViewAverager, names: Sequence[str], config: SegmentationConfig
) -> None:
    """Write `pictures/<number>.png` of the first `eval.n_pictures` images: image, truth and prediction side by side."""
    for i in range(min(config.eval.n_pictures, len(dataset))):
        views, (_, label) = dataset[i]
        scores = scores_of([view[None] for view in views], label.shape[-2:])
        truth = preprocess_nonzero_labels(label) if config.eval.reduce_zero_label else label
        pixels = F.interpolate(views[0][None], size=label.shape[-2:], mode="bilinear", align_corners=False)[0]
        image = as_picture(pixels, config.transforms.mean, config.transforms.std)
        draw_segmentation(folder / PICTURES / f"{i:04d}.png", image, scores.argmax(1)[0], names, truth=truth[0])


def draw_segmentation(
    path: Path, image: np.ndarray, prediction: Tensor, names: Sequence[str], *, truth: Tensor | None = None
) -> None:
    """One picture, with a legend of the classes in it.

    Args:
        path: PNG file to write.
        image: uint8 [H, W, 3].
        prediction: classes [H, W].
        names: of the classes.
        truth: classes [H, W], where it is known; ignored pixels are white.
    """
    colours = palette(len(names))
    predicted = colour_labels(prediction, colours)
    panels = {"image": image}
    if truth is not None:
        panels["truth"] = colour_labels(truth, colours)
    panels["prediction"] = predicted
    panels["overlay"] = overlay(image, predicted)
    shown = [prediction] if truth is None else [prediction, truth]
    present = torch.cat([labels.flatten().long().cpu() for labels in shown]).unique().tolist()
    legend = {f"{i}: {names[i]}" if names[i] != str(i) else names[i]: colours[i] for i in present if i < len(names)}
    save_panels(path, panels, legend={name: colour.tolist() for name, colour in legend.items()})
