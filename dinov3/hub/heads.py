"""From a head file to a model that is ready to use: what every task's training leaves behind."""

import importlib
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from dinov3.checkpointer.heads import HeadFile, read_head
from dinov3.hub.loading import WeightsLike, load_backbone
from dinov3.hub.registry import BACKBONES

# Task -> module whose `build_from_head(backbone, head_file)` makes the model, loading the head's tensors strictly.
_TASKS = {
    "segmentation": "dinov3.eval.segmentation.models",
    "depth": "dinov3.eval.depth.models",
    "detection": "dinov3.eval.detection.models",
}


def load_head(
    path: str | os.PathLike[str],
    backbone_weights: WeightsLike | None = None,
    backbone: nn.Module | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """A trained head on its backbone.

        model = dinov3.hub.load_head("runs/segmentation", backbone_weights="path/to/weights.pth")

    Args:
        path: a head file, or the output folder of the training that wrote it.
        backbone_weights: of the backbone that the file names; what `load_backbone` takes. None: the released ones.
        backbone: the backbone itself, instead of one that the file names; it is not copied.
        device: where the model goes; None: where the backbone is, the CPU if that is made here.

    Returns:
        The task's model in evaluation mode. Its attribute `head_file` holds what else the file says: class names,
        mean and standard deviation of the images, configuration (but no tensors).

    Raises:
        FileNotFoundError: no file there, or no weights; the message says where they can be had.
        ValueError: not a head file, an unknown task or backbone, both kinds of backbone, or tensors that don't fit.
    """
    head_file = read_head(path)
    if head_file.task not in _TASKS:
        raise ValueError(f"{os.fspath(path)} holds a head for {head_file.task!r}; known tasks: {', '.join(_TASKS)}")
    if backbone is not None and backbone_weights is not None:
        raise ValueError("got both a backbone and backbone_weights: give the weights to the backbone yourself")
    if backbone is None:
        backbone = _build_backbone(head_file, backbone_weights)
    tasks_models = importlib.import_module(_TASKS[head_file.task])
    model = cast(nn.Module, tasks_models.build_from_head(backbone, head_file))
    model.head_file = replace(head_file, head={})  # type: ignore[assignment]
    return (model if device is None else model.to(device)).eval()


def _build_backbone(head_file: HeadFile, weights: WeightsLike | None) -> nn.Module:
    spec = head_file.backbone
    if isinstance(spec, str):
        if spec not in BACKBONES:
            raise ValueError(f"the head was trained on {spec!r}, which this hub does not have: pass backbone=<module>")
        return load_backbone(spec) if weights is None else load_backbone(spec, weights=weights)
    return _build_described(spec, weights)


def _build_described(spec: dict[str, Any], weights: WeightsLike | None) -> nn.Module:
    """A backbone of a training's configuration, with weights of that training."""
    from dinov3.checkpointer.weights import load_weights, read_weights
    from dinov3.models.build import build_backbone

    if not isinstance(weights, str | os.PathLike):
        raise ValueError(
            f"the head was trained on a backbone of your own ({spec.get('arch')}): pass its weights, "
            f"backbone_weights=<teacher checkpoint>, or the module itself, backbone=<module>; got {weights!r}"
        )
    model = build_backbone(SimpleNamespace(**spec))
    load_weights(model, read_weights(weights, like=model))
    return model.eval()
