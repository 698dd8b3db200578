"""Measuring a depth model on a test set. The loop is here; single images are measured by `measure`."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.eval.accumulators import ResultsAccumulator
from dinov3.eval.data import short_name
from dinov3.eval.depth.config import DepthConfig
from dinov3.eval.depth.data import make_eval_loader
from dinov3.eval.depth.datasets.datasets_utils import make_valid_mask
from dinov3.eval.depth.metrics import METRICS, calculate_depth_metrics, check_metrics
from dinov3.eval.depth.models.linear_head import resize
from dinov3.eval.depth.transforms import LeftRightFlipAug
from dinov3.eval.depth.utils import align_depth_least_square
from dinov3.logging import MetricLogger
from dinov3.utils.device import default_device

logger = logging.getLogger("dinov3")

SaveResult = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with index, image `[3, h, w]`, prediction and true depth `[1, H, W]`."""


# Not inference mode: the first forward of a model sharded by FSDP must not run in it.
@torch.no_grad()
def evaluate_depther_with_dataloader(
    model: nn.Module,
    data_loader: Any,
    *,
    device: torch.device | str | None = None,
    metrics: Sequence[str] = METRICS,
    eval_range: tuple[float, float] = (0.001, 10.0),
    eval_mask_type: str = "FULL",
    ignored_value: float = 0.0,
    align_least_squares: bool = False,
    use_tta: bool = False,
    reduce_results: bool = True,
    save_result: SaveResult | None = None,
) -> dict[str, Any]:
    """Metrics of a model over a test set. A collective of the world.

    Args:
        model: from images `[B, 3, h, w]` to depth `[B, 1, H', W']`; put into evaluation mode.
        data_loader: batches (images, (index, depths)); images and depths are lists of views, two with `use_tta` (the
            second mirrored), else one. Samples with an index below 0 are predicted and not counted.
        device: where to compute; default: the accelerator if there is one.
        metrics: which.
        eval_range: true depths outside don't count, predictions are clamped to it [metres].
        eval_mask_type: part of the image that counts, see `make_valid_mask`.
        ignored_value: marks pixels without a true depth.
        align_least_squares: fit scale and shift of each prediction first.
        use_tta: average over both views.
        reduce_results: mean over the images that have valid pixels; otherwise the values of all images, NaN for those
            without valid pixels, in the order of their indices.
        save_result: called for every counted sample before its prediction is clamped.

    Returns:
        Metric -> mean, or list of values.
    """
    device = default_device() if device is None else torch.device(device)
    names = check_metrics(tuple(metrics))
    model.eval()
    views = LeftRightFlipAug(flip=use_tta)
    accumulator = ResultsAccumulator()
    for images, (index, depths) in MetricLogger(delimiter="  ").log_every(data_loader, 100, header="Test:"):
        batch = torch.cat([view.to(device, non_blocking=True) for view in images])
        predictions = views.inverse(model(batch))
        index = torch.as_tensor(index).reshape(-1)
        truths = depths[0].to(device, non_blocking=True)
        rows = []
        for i in (index >= 0).nonzero().flatten().tolist():
            prediction, truth, mask = fit_to_truth(
                predictions[i : i + 1],
                truths[i : i + 1],
                eval_range=eval_range,
                eval_mask_type=eval_mask_type,
                ignored_value=ignored_value,
                align_least_squares=align_least_squares,
            )
            if save_result is not None:
                save_result(int(index[i]), images[0][i], prediction[0], truth[0])
            rows.append(_values(names, truth, prediction.clamp(*eval_range), mask))
        values = torch.stack(rows) if rows else torch.empty(0, len(names), device=device)
        counted = index[index >= 0]
        accumulator.update(preds=values, target=counted, index=counted)
    per_image = accumulator.accumulate()["preds"]
    if not reduce_results:
        return {name: per_image[:, i].tolist() for i, name in enumerate(names)}
    return {name: per_image[:, i].double().nanmean().item() for i, name in enumerate(names)}


def fit_to_truth(
    prediction: Tensor,
    truth: Tensor,
    *,
    eval_range: tuple[float, float],
    eval_mask_type: str,
    ignored_value: float,
    align_least_squares: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What is compared: prediction in the truth's size, truth without depths out of range, mask; `[1, 1, H, W]`."""
    low, high = eval_range
    truth = torch.where((truth > low) & (truth < high), truth, ignored_value)
    mask = make_valid_mask(truth, eval_mask_type, ignored_value)
    prediction = resize(prediction, truth.shape[-2:])
    if align_least_squares:
        prediction, _, _ = align_depth_least_square(truth, prediction, mask)
    return prediction, truth, mask


def _values(names: Sequence[str], truth: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
    """Metrics of one image; all NaN without valid pixels, where silog alone would count as 0."""
    metrics = calculate_depth_metrics(truth, prediction, mask)
    values = torch.stack([metrics[name] for name in names])
    return torch.where((mask & (truth > 0)).any(), values, torch.nan)


def evaluate_dataset(
    depther: nn.Module,
    config: DepthConfig,
    name: str,
    *,
    tta: bool,
    reduce_results: bool = True,
    save_result: SaveResult | None = None,
) -> dict[str, Any]:
    """All metrics on the data set of the string `name`, as the configuration says; see above."""
    return evaluate_depther_with_dataloader(
        depther,
        make_eval_loader(name, config, tta=tta),
        eval_range=(config.eval.min_depth, config.eval.max_depth),
        eval_mask_type=config.transforms.eval.eval_mask,
        ignored_value=config.eval.ignored_value,
        align_least_squares=config.eval.align_least_squares,
        use_tta=tta,
        reduce_results=reduce_results,
        save_result=save_result,
    )


def test_depther(depther: nn.Module, config: DepthConfig) -> dict[str, float]:
    """Measure on `datasets.test`; write what is known of each image, and pictures if asked for.

    Returns:
        `<Dataset>_<metric>` -> mean over the images.

    Raises:
        ValueError: no data set.
    """
    if not config.datasets.test:
        raise ValueError("a test needs datasets.test, such as NYU:split=VAL or DepthFolder:split=test:root=<folder>")
    from dinov3.eval.depth.results import ResultWriter

    output_dir = Path(config.output_dir or ".")
    writer = None
    if config.result_config.save_results or config.result_config.save_error_maps:
        writer = ResultWriter(output_dir / "visualizations", config).save
    per_image = evaluate_dataset(
        depther, config, config.datasets.test, tta=config.eval.use_tta, reduce_results=False, save_result=writer
    )
    name = short_name(config.datasets.test)
    _write_per_image(output_dir / name / "results.json", per_image)
    means = {metric: torch.tensor(values).double().nanmean().item() for metric, values in per_image.items()}
    n_skipped = sum(value != value for value in per_image["rmse"])
    if n_skipped:
        logger.warning("%d of %d images have no valid pixel and are left out", n_skipped, len(per_image["rmse"]))
    logger.info("%s: %s", name, ", ".join(f"{metric} {value:.4f}" for metric, value in means.items()))
    return {f"{name}_{metric}": value for metric, value in means.items()}


def _write_per_image(path: Path, per_image: Mapping[str, list[float]]) -> None:
    if distributed.is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(per_image, indent=1))
