"""The mIoU family: areas of classes counted as integers, image by image, and metrics of their sums.

Counts are exact, add up over images and processes, and do not depend on the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

METRICS: dict[str, tuple[str, ...]] = {
    "mIoU": ("mIoU", "acc", "aAcc"),
    "dice": ("dice",),
    "fscore": ("fscore", "precision", "recall"),
}
"""What can be asked for -> what comes with it, in the order of reports."""


def preprocess_nonzero_labels(label: Tensor, ignore_index: int = 255) -> Tensor:
    """Labels that count from 1, with 0 for unlabelled, as labels from 0: 0 -> `ignore_index`, l -> l - 1.

    Args:
        label: integers (uint8 or wider), any shape; unchanged.
        ignore_index: stays as it is.
    """
    return torch.where((label == 0) | (label == ignore_index), ignore_index, label - 1).to(label.dtype)


def calculate_intersect_and_union(
    pred: Tensor,
    label: Tensor,
    num_classes: int,
    ignore_index: int = 255,
    reduce_zero_label: bool = False,
) -> Tensor:
    """Areas of each class, in pixels.

    Pixels whose label is `ignore_index` count nowhere. Where the label is another number beyond the classes, the
    prediction counts and the label does not.

    Args:
        pred: predicted classes, integers, any shape.
        label: true classes, integers, as many as `pred`.
        num_classes: K.
        ignore_index: label of pixels that do not count.
        reduce_zero_label: apply `preprocess_nonzero_labels` to `label` first.

    Returns:
        int64 [4, K]: intersection, union, predicted and labelled area.

    Raises:
        ValueError: `pred` and `label` differ in size.
    """
    if pred.numel() != label.numel():
        raise ValueError(f"a prediction of shape {tuple(pred.shape)} for labels of shape {tuple(label.shape)}")
    if reduce_zero_label:
        label = preprocess_nonzero_labels(label, ignore_index)
    counted = label.flatten() != ignore_index
    pred, label = pred.flatten()[counted].long(), label.flatten()[counted].long()
    intersection = _count(pred[pred == label], num_classes)
    predicted, labelled = _count(pred, num_classes), _count(label, num_classes)
    return torch.stack([intersection, predicted + labelled - intersection, predicted, labelled])


def calculate_segmentation_metrics(
    areas: Sequence[Tensor] | Tensor, metrics: Sequence[str] = ("mIoU",), beta: int = 1
) -> dict[str, float]:
    """Metrics of all pixels of all images together, as fractions.

    Args:
        areas: `[4, K]` of each image, from `calculate_intersect_and_union`.
        metrics: keys of `METRICS`.
        beta: weight of the recall in `fscore`.

    Returns:
        In this order, as far as asked for: `mIoU`, `acc`, `aAcc` (of all pixels), `dice`, `fscore`, `precision`,
        `recall`. Those of classes are means over the classes for which they exist: a class without a single pixel, or
        for the precision without prediction, doesn't count.

    Raises:
        ValueError: unknown metrics, or no image.
    """
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"unknown metrics {unknown}; known: {', '.join(METRICS)}")
    if len(areas) == 0:
        raise ValueError("expected the areas of at least one image")
    total = torch.stack(list(areas)).sum(dim=0)
    of_classes = calculate_class_metrics(total, beta)
    wanted = [name for key in METRICS if key in metrics for name in METRICS[key]]
    means = {name: values.nanmean().item() for name, values in of_classes.items()}
    means["aAcc"] = (total[0].sum().double() / total[3].sum()).item()
    return {name: means[name] for name in wanted}


def calculate_class_metrics(areas: Tensor, beta: int = 1) -> dict[str, Tensor]:
    """Metrics of each class, as fractions; NaN where a class has nothing to measure.

    Args:
        areas: `[4, K]`, summed over images.
        beta: weight of the recall in `fscore`.

    Returns:
        `mIoU`, `acc`, `dice`, `fscore`, `precision`, `recall`, each float64 [K].
    """
    intersection, union, predicted, labelled = areas.double()
    precision, recall = intersection / predicted, intersection / labelled
    return {
        "mIoU": intersection / union,
        "acc": recall,
        "dice": 2 * intersection / (predicted + labelled),
        "fscore": (1 + beta**2) * precision * recall / (beta**2 * precision + recall),
        "precision": precision,
        "recall": recall,
    }


def _count(classes: Tensor, num_classes: int) -> Tensor:
    """How often each class occurs; other numbers count nowhere."""
    inside = (classes >= 0) & (classes < num_classes)
    return torch.bincount(classes[inside], minlength=num_classes)
