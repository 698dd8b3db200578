"""The one evaluation loop: a model over a data set, on all processes, scored by metrics."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.data import DatasetWithEnumeratedTargets, SamplerType, make_data_loader
from dinov3.eval.accumulators import ResultsAccumulator
from dinov3.eval.data import pad_multilabel_and_collate
from dinov3.eval.metrics import ClassificationMetricType, Metric
from dinov3.logging import MetricLogger, SmoothedValue

Postprocessor = Callable[[Any, Tensor], Mapping[str, Tensor]]


def make_eval_data_loader(
    *, dataset: Any, batch_size: int, num_workers: int, metric_type: ClassificationMetricType
) -> Any:
    """Batches (images, (index, targets)) of a test set, spread over the processes.

    Every process gets equally many samples; those that fill up have the index -1, and so have samples that can't be
    read: they are not scored. The lists of labels of
    `ANY_MATCH_ACCURACY` are padded with -1.
    """
    world_size = distributed.get_world_size()
    lists_of_labels = metric_type is ClassificationMetricType.ANY_MATCH_ACCURACY
    return make_data_loader(
        dataset=DatasetWithEnumeratedTargets(dataset, pad_dataset=True, num_replicas=world_size, mark_skipped=True),
        batch_size=batch_size,
        num_workers=num_workers,
        shuffle=False,
        sampler_type=SamplerType.DISTRIBUTED,
        drop_last=False,
        persistent_workers=False,
        collate_fn=pad_multilabel_and_collate if lists_of_labels else None,
    )


# Not inference mode: the first forward of a model sharded by FSDP must not run in it.
@torch.no_grad()
def evaluate(
    model: nn.Module,
    data_loader: Any,
    postprocessors: Mapping[Any, Postprocessor],
    metrics: Mapping[Any, Metric],
    device: torch.device | str,
    criterion: Callable[[Any, Tensor], Tensor] | None = None,
    accumulate_results: bool = False,
) -> tuple[dict[str, float], dict[Any, dict[str, Tensor]], dict[Any, Mapping[str, Tensor] | None]]:
    """Run a model over a data set and score it in several ways at once. A collective of the world.

    The model runs on every batch of every process, whole batches of padding included: models that are sharded over the
    processes communicate in `forward`. Padding and samples that can't be read (index below 0) are not scored.

    Args:
        model: from images to outputs of any form; put into evaluation mode.
        data_loader: batches (images, (index, targets), ...).
        postprocessors: by key: `(outputs, targets) -> {"preds": scores, "target": targets}` for the metric.
        metrics: by the same keys.
        device: where to compute.
        criterion: `(outputs, targets) -> loss`, averaged over batches (of outputs of scored samples).
        accumulate_results: also return the predictions and targets of all samples.

    Returns:
        `{"loss": mean}` if there is a criterion, else `{}`; the results of the metrics by key; and by key
        `{"preds", "target"}` of all samples in order, or None.
    """
    model.eval()
    accumulators = {key: ResultsAccumulator() for key in postprocessors} if accumulate_results else {}
    for metric in metrics.values():
        metric.to(device)
    logger = MetricLogger(delimiter="  ")
    if criterion is not None:  # also where no sample is scored: all processes bring the same meters
        logger.add_meter("loss", SmoothedValue())
    for samples, (index, targets), *_ in logger.log_every(data_loader, 100, header="Test:"):
        outputs = model(samples.to(device, non_blocking=True))
        scored = index >= 0
        index, targets, outputs = index[scored], targets[scored].to(device), _rows(outputs, scored)
        if criterion is not None and len(index):
            logger.update(loss=criterion(outputs, targets))
        for key, postprocessor in postprocessors.items():
            scores = postprocessor(outputs, targets)
            metrics[key].update(**scores)
            if accumulate_results:
                accumulators[key].update(**scores, index=index)
    logger.synchronize_between_processes()
    stats = {name: meter.global_avg for name, meter in logger.meters.items()}
    results = {key: metric.compute() for key, metric in metrics.items()}
    return stats, results, {k: accumulators[k].accumulate() if accumulate_results else None for k in postprocessors}


def _rows(outputs: Any, keep: Tensor) -> Any:
    """These rows of every tensor in nested mappings and sequences."""
    if keep.all():
        return outputs
    if isinstance(outputs, Tensor):
        return outputs[keep.to(outputs.device)]
    if isinstance(outputs, Mapping):
        return {key: _rows(value, keep) for key, value in outputs.items()}
    return type(outputs)(_rows(value, keep) for value in outputs)
