"""Frozen models as feature extractors: wrappers, features of whole data sets, and such features as files.

Which layers of a backbone make a feature is `dinov3.models.features`' business; here are the wrappers that the
classification evaluations put around a model, and the loop that runs a model over a data set on all processes.
"""

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.data import DatasetWithEnumeratedTargets, SamplerType, make_data_loader
from dinov3.eval.data import SubsetEx, equal_widths, pad_multilabel_and_collate
from dinov3.logging import MetricLogger
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
        with torch.no_grad(), self.autocast_ctx():
            return self.feature_model.get_intermediate_layers(  # type: ignore[operator]
                images, n=self.n, reshape=self.reshape, return_class_token=self.return_class_token
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

    The samples are spread over the processes; each batch's results are gathered, so that no process holds more than the
    result and one batch. A collective of the world.

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
    if len(dataset) == 0:
        raise ValueError("the data set is empty: there are no features to extract")
    device = module_device(model)
    home = torch.device("cpu") if gather_on_cpu else device
    loader = make_data_loader(
        dataset=DatasetWithEnumeratedTargets(dataset),
        batch_size=batch_size,
        num_workers=num_workers,
        shuffle=False,
        sampler_type=SamplerType.DISTRIBUTED,
        drop_last=False,
        collate_fn=pad_multilabel_and_collate if lists_of_labels else None,
    )
    features: Tensor | None = None
    labels: Tensor | None = None
    for samples, (index, targets) in MetricLogger(delimiter="  ").log_every(loader, 100, header="Features:"):
        batch = model(samples.to(device, non_blocking=True)).float()
        # All processes have equally many batches; the last ones repeat samples, which are then written twice.
        rows = torch.cat(distributed.gather_all_tensors(index.to(device))).to(home)
        features = _written(features, rows, batch, 0.0, len(dataset), home)
        labels = _written(labels, rows, targets.to(device, torch.int64), -1, len(dataset), home)
    assert features is not None
    assert labels is not None
    logger.info("features of %d samples: %s on %s", len(dataset), tuple(features.shape), home)
    return features, labels


def _written(
    table: Tensor | None, rows: Tensor, values: Tensor, padding: float, count: int, home: torch.device
) -> Tensor:
    """The table `[count, ...]` with the values of all processes in these rows; made, and widened, as needed."""
    gathered = equal_widths(distributed.gather_all_tensors(values), padding)
    merged = torch.cat(gathered).to(home)
    if table is None:
        table = torch.full((count, *merged.shape[1:]), padding, dtype=values.dtype, device=home)
    table, merged = equal_widths([table, merged], padding)
    table[rows] = merged
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
    features, labels = extract_features(model, needed, batch_size, num_workers, gather_on_cpu=True)
    rows = {t: torch.searchsorted(union, parts[t]) if t in parts else slice(None) for t in subsets}
    return {t: (features[r], labels[r]) for t, r in rows.items()}


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


def save_features_dict(features_dict: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write named tensors to a `.pt` or a `.npy` file, by the extension."""
    tensors = {name: tensor.detach().cpu() for name, tensor in features_dict.items()}
    if _extension(path) == ".pt":
        torch.save(tensors, path)
    else:
        arrays: Any = {name: tensor.numpy() for name, tensor in tensors.items()}
        np.save(path, arrays, allow_pickle=True)


def load_features_dict(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Read named tensors, to the CPU.

    Args:
        path: a file of `save_features_dict`.
        allow_pickle: needed for `.npy` files, which hold a pickled dictionary: reading one runs code that is in it, so
            only read files that you trust.

    Raises:
        ValueError: another extension, or a pickled file without `allow_pickle`.
    """
    if _extension(path) == ".pt":
        loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return loaded
    if not allow_pickle:
        raise ValueError(
            f"{path} is a pickled dictionary, and unpickling can run any code: if you trust the file, pass "
            "allow_pickle=True, and save it as .pt, which needs no pickle"
        )
    arrays = np.load(path, allow_pickle=True).item()
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _extension(path: str | os.PathLike[str]) -> str:
    extension = Path(path).suffix
    if extension not in (".pt", ".npy"):
        raise ValueError(f"features are stored as .pt or .npy, got {os.fspath(path)!r}")
    return extension
