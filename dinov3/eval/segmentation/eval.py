"""Measuring segmentation models: classes counted image by image, metrics of all images together."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.distributed import gather_all_tensors
from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.data import class_names, make_eval_dataset, make_eval_loader
from dinov3.eval.segmentation.inference import HeadType, Predictor
from dinov3.eval.segmentation.metrics import calculate_intersect_and_union, calculate_segmentation_metrics
from dinov3.eval.segmentation.results import draw_samples, write_class_table
from dinov3.eval.segmentation.views import ViewAverager
from dinov3.eval.segmentation.weights import adopt_head, load_decoder
from dinov3.logging import MetricLogger
from dinov3.utils.device import default_device

logger = logging.getLogger("dinov3")

_REPORTED = ("mIoU", "dice", "fscore")


def evaluate_segmentation_model(
    segmentation_model: Predictor,
    test_dataloader: Iterable[Any],
    device: torch.device | str,
    eval_res: int | None,
    eval_stride: int | None,
    decoder_head_type: HeadType,
    num_classes: int,
    autocast_dtype: torch.dtype,
    *,
    inference_mode: str = "slide",
    reduce_zero_label: bool = True,
    compute_metric_per_image: bool = False,
) -> dict[str, float]:
    """The mIoU family in percent, rounded to two decimals. A collective of the world.

    Args:
        segmentation_model: its `predict` is called, see `make_inference`.
        test_dataloader: batches of one image: (views [1, 3, h, w], (index, label [1, 1, H, W])). The second half of
            several views are mirrored. Each process brings its own images.
        device: where to compute.
        eval_res, eval_stride: side of square windows, and step between them [pixels].
        decoder_head_type: `linear` or `m2f`.
        num_classes: K.
        autocast_dtype: that views have.
        inference_mode: `slide`, or `whole`: a view in one forward, at its size.
        reduce_zero_label: labels count from 1, and 0 is unlabelled.
        compute_metric_per_image: the mean of the metrics of single images.

    Returns:
        mIoU, acc, aAcc, dice, fscore, precision, recall, in this order.

    Raises:
        ValueError: no image.
    """
    scores_of = ViewAverager(
        segmentation_model,
        device,
        decoder_head_type,
        num_classes,
        inference_mode,
        crop_size=eval_res,
        stride=eval_stride,
        dtype=autocast_dtype,
    )
    areas = measure_areas(scores_of, test_dataloader, reduce_zero_label=reduce_zero_label)
    return summarize_areas(areas, per_image=compute_metric_per_image)


def measure_areas(scores_of: ViewAverager, test_dataloader: Iterable[Any], *, reduce_zero_label: bool) -> Tensor:
    """Areas of the classes in each image of all processes, int64 [n, 4, K], see `calculate_intersect_and_union`.

    Args:
        scores_of: the model, put into evaluation mode, and how it is asked.
        test_dataloader, reduce_zero_label: see `evaluate_segmentation_model`.
    """
    if isinstance(scores_of.model, nn.Module):
        scores_of.model.eval()
    n = scores_of.num_classes
    areas = [torch.empty(0, 4, n, dtype=torch.int64)]  # a process may have no image
    for views, (_, label) in MetricLogger(delimiter="  ").log_every(test_dataloader, 100, header="Test:"):
        prediction = scores_of(views, label.shape[-2:]).argmax(dim=1)
        label = label.to(prediction.device)
        areas.append(
            calculate_intersect_and_union(prediction, label, n, reduce_zero_label=reduce_zero_label).cpu()[None]
        )
    return torch.cat(gather_all_tensors(torch.cat(areas)))


def summarize_areas(areas: Tensor, *, per_image: bool = False) -> dict[str, float]:
    """Metrics in percent of areas [n, 4, K]; `per_image`: the means over images of their own metrics.

    Raises:
        ValueError: no image.
    """
    if len(areas) == 0:
        raise ValueError("there is no image to evaluate: the data set is empty")
    groups = [area[None] for area in areas] if per_image else [areas]
    metrics = [calculate_segmentation_metrics(list(group), metrics=_REPORTED) for group in groups]
    means = {name: torch.tensor([m[name] for m in metrics], dtype=torch.float64).nanmean() for name in metrics[0]}
    return {name: round(100 * mean.item(), 2) for name, mean in means.items()}


def test_segmentation(backbone: nn.Module | None, config: SegmentationConfig) -> dict[str, float]:
    """Evaluate the head that `load_from` names; writes the table of classes and the pictures.

    Args:
        backbone: see `load_decoder`.
        config: images are resized to `eval.crop_size`, and seen in several views with `eval.use_tta`.

    Returns:
        See `evaluate_segmentation_model`.
    """
    device = default_device()
    config = adopt_head(config)
    decoder = load_decoder(backbone, config).to(device)
    scores_of = ViewAverager.from_config(decoder, config, device)
    dataset = make_eval_dataset(config, img_size=config.eval.crop_size, use_tta=config.eval.use_tta)
    loader = make_eval_loader(dataset, num_workers=config.num_workers)
    areas = measure_areas(scores_of, loader, reduce_zero_label=config.eval.reduce_zero_label)
    metrics = summarize_areas(areas, per_image=config.eval.compute_metric_per_image)
    logger.info("%s: %s", config.datasets.val, metrics)
    write_report(scores_of, areas, dataset, config)
    return metrics


test_segmentation.__test__ = False  # type: ignore[attr-defined]  # a public name, which is no test


def write_report(scores_of: ViewAverager, areas: Tensor, dataset: Any, config: SegmentationConfig) -> None:
    """Write the table of classes and the pictures into the output folder (main process only)."""
    if not distributed.is_main_process():
        return
    folder = Path(config.output_dir or ".")
    names = class_names(dataset, scores_of.num_classes)
    table = write_class_table(folder, areas.sum(0), names)
    draw_samples(folder, dataset, scores_of, names, config)
    logger.info("classes one by one: %s", table)
