"""Features of a folder of images, or of any data set, as files: a script, and what evaluations take features with.

    python dinov3/eval/features.py output_dir=<OUT> dataset=<FOLDER OR STRING> model.dino_hub=dinov3_vits16
        model.pretrained_weights=<FILE>

writes shards of `shard_size` rows in the order of the data set, in the format `format` (safetensors, npy or parquet);
what a row holds is up to `tokens`:

    cls         the class token of the last `layers` layers, one after the other: what k-NN and logistic regression use
    mean        the mean patch token of the last layer
    cls_mean    both, one after the other: what linear heads are trained on
    patches     all patch tokens, `[P, D]`, those of several layers one after the other in D

Started again, it goes on after the last complete shard. Any evaluation of classifications can start from such a folder
instead of images: `train.dataset=Features:root=<OUT>` (`feature_files.py`).

Which layers of a backbone make a feature is `dinov3.models.features`' business; the rest of this file are the wrappers
that the classification evaluations put around a model, and the loop that runs it over a data set on all processes.
"""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.data import (
    DatasetWithEnumeratedTargets,
    SamplerType,
    make_classification_eval_transform,
    make_data_loader,
    make_dataset,
)
from dinov3.data.registry import as_dataset_str
from dinov3.eval.config import MISSING, ModelConfig, TransformConfig
from dinov3.eval.data import SubsetEx, equal_widths, pad_multilabel_and_collate, report_skipped
from dinov3.eval.feature_files import FeatureRequest, FeatureWriter, Tokens
from dinov3.eval.helpers import args_dict_to_dataclass, check_eval_arguments, run_main
from dinov3.eval.setup import load_model_and_context
from dinov3.logging import MetricLogger
from dinov3.logging.progress import progress_bar
from dinov3.models.features import Features, FrozenFeatures, take_layers
from dinov3.utils.device import default_device

logger = logging.getLogger("dinov3")

_SCALES = (1.0, 0.5**0.5, 0.5)


class ModelWithNormalize(nn.Module):
    """L2-normalises the features of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, samples: Tensor) -> Tensor:
        """Features of unit length, `[B, D]`."""
        return F.normalize(self.model(samples), dim=1, p=2, eps=1e-12)


class ModelWithMultiScale(nn.Module):
    """Mean of the features of a model over three image sizes: the given one, and 1/sqrt(2) and 1/2 of it."""

    def __init__(self, model: nn.Module, mode: str = "bilinear") -> None:
        super().__init__()
        self.model = model
        self.mode = mode

    def forward(self, samples: Tensor) -> Tensor:
        """Mean features, `[B, D]`."""
        total: Any = 0
        for scale in _SCALES:
            resized = samples
            if scale != 1:
                resized = F.interpolate(samples, scale_factor=scale, mode=self.mode, align_corners=False)
            total = total + self.model(resized)
        features: Tensor = total / len(_SCALES)
        return features


def wrap_model(model: nn.Module, *, normalize: bool = True, multi_scale: bool = False) -> nn.Module:
    """The model with several image sizes, if asked for, inside the normalisation, if asked for."""
    if multi_scale:
        model = ModelWithMultiScale(model)
    return ModelWithNormalize(model) if normalize else model


class ModelWithIntermediateLayers(nn.Module):
    """The outputs of the last layers of a frozen backbone.

    Args:
        feature_model: backbone with `get_intermediate_layers`.
        n: number of last layers, or their indices.
        autocast_ctx: makes the autocast context to run in.
        reshape: give patch tokens as maps.
        return_class_token: give pairs (patch tokens, class token).
    """

    def __init__(
        self,
        feature_model: nn.Module,
        n: int | list[int],
        autocast_ctx: Callable[[], AbstractContextManager[Any]],
        reshape: bool = False,
        return_class_token: bool = True,
    ) -> None:
        super().__init__()
        self.feature_model = feature_model
        self.n = n
        self.autocast_ctx = autocast_ctx
        self.reshape = reshape
        self.return_class_token = return_class_token

    def forward(self, images: Tensor) -> Any:
        """What `get_intermediate_layers` gives for `images`, without gradient."""
        return take_layers(
            self.feature_model,
            images,
            self.n,
            self.autocast_ctx(),
            reshape=self.reshape,
            return_class_token=self.return_class_token,
        )


def module_device(module: nn.Module) -> torch.device:
    """Where a module's parameters are (its buffers, if it has none); the default device for a module without either."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return default_device()


# Not inference mode: the first forward of a model sharded by FSDP must not run in it.
@torch.no_grad()
def extract_features(
    model: nn.Module,
    dataset: Any,
    batch_size: int,
    num_workers: int,
    gather_on_cpu: bool = False,
    *,
    lists_of_labels: bool = False,
) -> tuple[Tensor, Tensor]:
    """Features and labels of a whole data set, in its order, on every process.

    Samples that can't be read, in whose place the data set gives others, are left out. The samples are spread over the
    processes; each batch's results are gathered, so that no process holds more than the result and one batch. A
    collective of the world.

    Args:
        model: gives `[B, D]` for images `[B, C, H, W]`.
        dataset: map-style, of (image, label).
        batch_size: per process.
        num_workers: of the data loader, per process.
        gather_on_cpu: keep the result on the CPU rather than on the model's device.
        lists_of_labels: a target is a list of class numbers; labels are padded with -1.

    Returns:
        Features, float32 `[N, D]`, and labels, int64 `[N]`, or `[N, C]` of multi-hot rows and padded lists.

    Raises:
        ValueError: the data set is empty.
    """
    features, labels, seen = _extract(
        model, dataset, batch_size, num_workers, gather_on_cpu, lists_of_labels=lists_of_labels
    )
    if not seen.all():
        features, labels = features[seen.to(features.device)], labels[seen.to(labels.device)]
    return features, labels


def _extract(
    model: nn.Module, dataset: Any, batch_size: int, num_workers: int, gather_on_cpu: bool, *, lists_of_labels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Features and labels with a row for every sample, and bool `[N]`, on the CPU: whether a row is filled."""
    if len(dataset) == 0:
        raise ValueError("the data set is empty: there are no features to extract")
    device = module_device(model)
    home = torch.device("cpu") if gather_on_cpu else device
    loader = make_data_loader(
        dataset=DatasetWithEnumeratedTargets(dataset, mark_skipped=True),
        batch_size=batch_size,
        num_workers=num_workers,
        shuffle=False,
        sampler_type=SamplerType.DISTRIBUTED,
        drop_last=False,
        collate_fn=pad_multilabel_and_collate if lists_of_labels else None,
    )
    features: Tensor | None = None
    labels: Tensor | None = None
    seen = torch.zeros(len(dataset), dtype=torch.bool)
    for samples, (index, targets) in MetricLogger(delimiter="  ").log_every(loader, 100, header="Features:"):
        batch = model(samples.to(device, non_blocking=True)).float()
        # All processes have equally many batches; the last ones repeat samples, which are then written twice.
        rows = torch.cat(distributed.gather_all_tensors(index.to(device))).to(home)
        features = _written(features, rows, batch, 0.0, len(dataset), home)
        labels = _written(labels, rows, targets.to(device, torch.int64), -1, len(dataset), home)
        seen[rows[rows >= 0].cpu()] = True
    assert features is not None
    assert labels is not None
    logger.info("features of %d samples: %s on %s", len(dataset), tuple(features.shape), home)
    if not seen.all():
        logger.warning("%d of %d samples can't be read and are left out", len(seen) - int(seen.sum()), len(seen))
    return features, labels, seen


def _written(
    table: Tensor | None, rows: Tensor, values: Tensor, padding: float, count: int, home: torch.device
) -> Tensor:
    """The table `[count, ...]` with the values of all processes in these rows; made, and widened, as needed.

    Rows below 0 are of samples that couldn't be read: their values are dropped.
    """
    gathered = equal_widths(distributed.gather_all_tensors(values), padding)
    merged = torch.cat(gathered).to(home)
    if table is None:
        table = torch.full((count, *merged.shape[1:]), padding, dtype=values.dtype, device=home)
    table, merged = equal_widths([table, merged], padding)
    table[rows[rows >= 0]] = merged[rows >= 0]
    return table


@torch.no_grad()
def extract_subsets(
    model: nn.Module, dataset: Any, subsets: Mapping[int, Any], batch_size: int, num_workers: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """Features and labels, on the CPU, of several parts of a data set; what they share is extracted once.

    Args:
        model, batch_size, num_workers: as in `extract_features`.
        dataset: the whole.
        subsets: `Subset`s of it, or the whole itself.
    """
    parts = {t: torch.as_tensor(s.indices) for t, s in subsets.items() if s is not dataset}
    union = torch.cat(list(parts.values())).unique() if len(parts) == len(subsets) else torch.arange(len(dataset))
    needed = dataset if len(union) == len(dataset) else SubsetEx(dataset, union.tolist())
    features, labels, seen = _extract(model, needed, batch_size, num_workers, True, lists_of_labels=False)
    if bool(seen.all()) and not parts:
        return {t: (features, labels) for t in subsets}  # no copy
    everything = torch.arange(len(union))
    rows = {t: torch.searchsorted(union, parts[t]) if t in parts else everything for t in subsets}
    return {t: (features[r[seen[r]]], labels[r[seen[r]]]) for t, r in rows.items()}


def on_device_if_it_fits(features: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The features on `device` if they leave half of its free memory; otherwise where they are, with a log line.

    Args:
        features: any tensor.
        device: where they are going to be used.
        dtype: what they are converted to; None: no conversion.
    """
    features = features.to(dtype or features.dtype)
    if features.device.type == device.type or device.type == "cpu":
        return features.to(device)
    memory_info = getattr(torch.get_device_module(device), "mem_get_info", None)
    if memory_info is not None and features.nbytes > memory_info(device)[0] // 2:
        logger.info("the features (%.1f GiB) stay in host memory", features.nbytes / 2**30)
        return features
    return features.to(device)


@dataclass
class FeaturesConfig:
    """Configuration of the extraction to files."""

    model: ModelConfig = MISSING
    dataset: str = MISSING
    """A folder of images, or a dataset string."""
    tokens: Tokens = Tokens.CLS
    """What a row holds: cls, mean, cls_mean or patches."""
    layers: int = 1
    """Number of last layers, normalised."""
    format: str = "safetensors"
    """safetensors, npy or parquet."""
    dtype: str = "fp32"
    """Of the numbers in the files: fp32 or fp16."""
    shard_size: int = 10_000
    """Images per file."""
    batch_size: int = 256
    """Per process."""
    num_workers: int = 5
    """Of the data loader, per process."""
    transform: TransformConfig = field(default_factory=TransformConfig)
    output_dir: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see the module's docstring. Returns 0."""
    return run_main(argv, benchmark_launcher, FeaturesConfig)


check_arguments = partial(check_eval_arguments, FeaturesConfig)


def benchmark_launcher(eval_args: Mapping[str, Any]) -> Path:
    """Extract as the parsed arguments say; return the folder."""
    config, output_dir = args_dict_to_dataclass(eval_args, FeaturesConfig)
    model, context = load_model_and_context(
        config.model, output_dir, allow_unknown_keys=bool(eval_args.get("allow_unknown_keys"))
    )
    return write_features(model=model, autocast_dtype=context["autocast_dtype"], config=config)


def write_features(*, model: nn.Module, autocast_dtype: torch.dtype, config: FeaturesConfig) -> Path:
    """Write the features of a data set; every process takes every n-th shard. Returns the folder.

    Args:
        model: a `Backbone`.
        autocast_dtype: what it runs in.
        config: what to write.

    Raises:
        ValueError: the folder holds features of something else, or impossible options.
    """
    transform = make_classification_eval_transform(
        resize_size=config.transform.resize_size, crop_size=config.transform.crop_size
    )
    dataset = make_dataset(dataset_str=as_dataset_str(config.dataset), transform=transform)
    report_skipped(dataset, config.output_dir)
    backbone = FrozenFeatures(model.to(default_device()), config.layers, autocast_dtype=autocast_dtype)
    request = FeatureRequest.of(config, len(dataset), backbone.embed_dims)
    writer = FeatureWriter(config.output_dir, request, dataset)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    missing = [shard for shard in writer.missing_shards() if shard % world_size == rank]
    rows = [row for shard in missing for row in writer.rows(shard)]
    logger.info("%d shards of %d are to be written here", len(missing), writer.n_shards)
    loader = make_data_loader(
        dataset=DatasetWithEnumeratedTargets(SubsetEx(dataset, rows), mark_skipped=True),
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        shuffle=False,
        sampler_type=None,
        drop_last=False,
        collate_fn=_images_and_marks,
    )
    with progress_bar(len(loader), description="Features") as bar:
        remaining = iter(rows)
        for images, readable in loader if rows else ():
            vectors = rows_of(backbone(images.to(default_device(), non_blocking=True)), config.tokens).cpu()
            for vector, fine in zip(vectors, readable, strict=True):
                writer.add(next(remaining), vector if fine else None)
            bar.update()
    if distributed.get_world_size() > 1:
        torch.distributed.barrier()
    writer.finish()
    return Path(config.output_dir)


def rows_of(features: Features, tokens: Tokens) -> Tensor:
    """What is written of a batch: float32 `[B, D]`, or `[B, P, D]` of patches."""
    if tokens is Tokens.PATCHES:
        return torch.cat([layer.tokens for layer in features.layers], dim=-1).float()
    parts = [layer.class_token for layer in features.layers] if tokens is not Tokens.MEAN else []
    if tokens is not Tokens.CLS:
        parts.append(features.layers[-1].tokens.mean(1))
    return torch.cat(parts, dim=-1).float()


def _images_and_marks(samples: Sequence[tuple[Tensor, tuple[int, Any]]]) -> tuple[Tensor, list[bool]]:
    """Images, and which of them are those that were asked for."""
    return torch.stack([image for image, _ in samples]), [index >= 0 for _, (index, _) in samples]


if __name__ == "__main__":
    sys.exit(main())
