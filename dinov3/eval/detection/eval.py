"""Measuring a detector on a test set by COCO's figures, and drawing some of its images."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dinov3 import distributed
from dinov3.data.datasets import CocoDetection
from dinov3.eval.data import short_name
from dinov3.eval.detection.data import make_eval_loader, open_dataset
from dinov3.eval.detection.inference import Views, detect, soft_nms
from dinov3.eval.detection.metrics import (
    Record,
    coco_figures,
    detections_of,
    from_main_process,
    gather_records,
    records_of,
)
from dinov3.eval.detection.models.processor import above
from dinov3.eval.detection.recipe import DetectionConfig
from dinov3.logging import MetricLogger
from dinov3.utils.device import default_device

logger = logging.getLogger("dinov3")


def predict_dataset(
    model: nn.Module,
    dataset: CocoDetection,
    views: Views,
    *,
    id_of: Mapping[int, int] | None = None,
    num_workers: int = 0,
    topk: int | None = None,
) -> list[Record]:
    """Detections of all images in COCO's form, on the main process. A collective of the world.

    Args:
        model: a `DetectorWithProcessor`; put into evaluation mode.
        dataset: without transforms.
        views: what the detector sees of an image.
        id_of: class -> category id; None: as the data set has it.
        num_workers: processes that load images.
        topk: detections to keep of several views.

    Returns:
        The records in the order of the images; empty on other processes.
    """
    model.eval()
    id_of = dataset.categories.id_of if id_of is None else id_of
    device = default_device()
    records: list[Record] = []
    items = make_eval_loader(dataset, views, num_workers)
    for item in MetricLogger(delimiter="  ").log_every(items, 100, header="Test:"):
        detections = detect(model, item.views, item.size, device, topk)
        records += records_of(item.image_id, detections, id_of)
    order = {dataset.image_id(index): index for index in range(len(dataset))}
    return sorted(gather_records(records), key=lambda record: order[record["image_id"]])


def evaluate_dataset(
    model: nn.Module, dataset: CocoDetection, views: Views, **options: Any
) -> tuple[dict[str, float], list[Record]]:
    """The figures, equal on all processes, and the records of the main process; options as of `predict_dataset`."""
    records = predict_dataset(model, dataset, views, **options)
    figures = coco_figures(dataset.coco, records) if distributed.is_main_process() else None
    return from_main_process(figures), records


def make_views(config: DetectionConfig, multiple: int, *, tta: bool = False) -> Views:
    """What the detector sees of an image, as the configuration says."""
    options, evaluation = config.transforms.eval, config.eval
    sides = evaluation.tta_short_sides if tta else [options.short_side]
    max_size = None if tta else options.max_size
    return Views(sides, max_size, multiple, config.transforms.mean, config.transforms.std, mirror=tta)


def evaluate_detector(
    model: nn.Module,
    config: DetectionConfig,
    *,
    multiple: int,
    id_of: Mapping[int, int] | None = None,
) -> dict[str, float]:
    """Measure on `datasets.val`; write figures, predictions and pictures. A collective of the world.

    Args:
        model: a `DetectorWithProcessor`.
        config: what to measure on, and where files go.
        multiple: what sides of images become multiples of.
        id_of: class -> category id; None: as the data set has it.

    Returns:
        `<Dataset>_<figure>` for the twelve figures.

    Raises:
        ValueError: no data set.
    """
    if not config.datasets.val:
        raise ValueError("a test needs datasets.val, such as CocoDetection:split=val2017")
    dataset, name = open_dataset(config.datasets.val, config), short_name(config.datasets.val)
    id_of = dataset.categories.id_of if id_of is None else id_of
    figures, records = evaluate_dataset(
        model,
        dataset,
        make_views(config, multiple, tta=config.eval.use_tta),
        id_of=id_of,
        num_workers=config.num_workers,
        topk=config.eval.topk,
    )
    logger.info("%s: %s", name, ", ".join(f"{figure} {value:.4f}" for figure, value in figures.items()))
    if distributed.is_main_process():
        folder = Path(config.output_dir or ".") / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(figures, indent=1))
        if config.eval.save_predictions:
            (folder / "predictions.json").write_text(json.dumps(records))
        draw_predictions(folder / "pictures", dataset, records, config.eval.n_pictures, config.eval.picture_score)
    return {f"{name}_{figure}": value for figure, value in figures.items()}


def draw_predictions(
    folder: Path, dataset: CocoDetection, records: list[Record], n_pictures: int, min_score: float
) -> None:
    """Pictures of the first images: objects on the left, detections on the right.

    Soft-NMS has lowered the scores of detections that lie upon better ones, so that things are drawn once.

    Args:
        folder: where `<name of the image>.png` are written.
        dataset: without transforms.
        records: in COCO's form.
        n_pictures: how many images.
        min_score: detections below it are not drawn.
    """
    from dinov3.eval.pictures import as_picture, draw_boxes, palette, save_panels

    names = dict(zip(dataset.categories.ids, dataset.categories.names, strict=True))
    colours = dict(zip(names, palette(len(names)).tolist(), strict=True))
    id_of = dataset.categories.id_of
    for index in range(min(n_pictures, len(dataset))):
        image, target = dataset[index]
        picture = as_picture(image)
        there = [id_of[label] for label in target["labels"].tolist()]
        own = [record for record in records if record["image_id"] == target["image_id"]]
        found = above(soft_nms(detections_of(own), len(own)), min_score)
        categories, scores = found["labels"].tolist(), found["scores"].tolist()
        panels = {
            "objects": draw_boxes(
                picture, target["boxes"].tolist(), [names[c] for c in there], [colours[c] for c in there]
            ),
            "detections": draw_boxes(
                picture,
                found["boxes"].tolist(),
                [f"{names[c]} {score:.2f}" for c, score in zip(categories, scores, strict=True)],
                [colours[c] for c in categories],
            ),
        }
        save_panels(folder / Path(dataset.get_image_relpath(index)).with_suffix(".png").name, panels)
