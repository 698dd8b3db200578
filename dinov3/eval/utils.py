"""Names that evaluations are written with, from where they live, and two helpers for results.

Features: `features.py`; the evaluation loop: `evaluate.py`; losses: `config.py`.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3.eval.config import LossType
from dinov3.eval.evaluate import evaluate, make_eval_data_loader
from dinov3.eval.feature_files import load_features_dict, save_features_dict
from dinov3.eval.features import (
    ModelWithIntermediateLayers,
    ModelWithMultiScale,
    ModelWithNormalize,
    extract_features,
    wrap_model,
)

__all__ = [
    "LossType",
    "ModelWithIntermediateLayers",
    "ModelWithMultiScale",
    "ModelWithNormalize",
    "average_metrics",
    "evaluate",
    "extract_features",
    "load_features_dict",
    "make_eval_data_loader",
    "save_features_dict",
    "save_results",
    "wrap_model",
]


def average_metrics(
    eval_metrics_dict: Mapping[Any, Mapping[str, Any]], ignore_keys: Collection[str] = ()
) -> dict[str, float]:
    """Mean and sample standard deviation of every metric over several tries, computed in float32.

    Args:
        eval_metrics_dict: metrics by try; all tries have the same ones.
        ignore_keys: metrics to leave out.

    Returns:
        `{"<metric>_mean": ..., "<metric>_std": ...}`; the deviation of a single try is NaN.
    """
    tries = list(eval_metrics_dict.values())
    averages: dict[str, float] = {}
    for name in tries[0]:
        if name in ignore_keys:
            continue
        values = torch.tensor([float(metrics[name]) for metrics in tries], dtype=torch.float32)
        averages[f"{name}_mean"] = values.mean().item()
        averages[f"{name}_std"] = values.std().item() if len(tries) > 1 else float("nan")
    return averages


def save_results(
    preds: Tensor, target: Tensor, output_dir: str | os.PathLike[str], filename_suffix: str | None = None
) -> None:
    """Write `preds[_<suffix>].npy` and `target[_<suffix>].npy` into the output directory, which is made if needed."""
    suffix = "" if filename_suffix is None else f"_{filename_suffix}"
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in (("preds", preds), ("target", target)):
        np.save(folder / f"{name}{suffix}.npy", tensor.detach().cpu().numpy())
