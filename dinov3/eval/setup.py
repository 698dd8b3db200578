"""The frozen model of an evaluation: from its configuration to a module on the device, and the dtype to run it in."""

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from dinov3.eval.config import ModelConfig
from dinov3.eval.feature_files import stored_model
from dinov3.models.features import autocast_context
from dinov3.utils.device import default_device

logger = logging.getLogger("dinov3")

__all__ = ["ModelConfig", "autocast_context", "describe_model", "load_model_and_context", "setup_and_build_model"]


def load_model_and_context(
    model_config: ModelConfig,
    output_dir: str,
    *,
    allow_unknown_keys: bool = False,
    datasets: Iterable[str | None] = (),
) -> tuple[nn.Module, dict[str, Any]]:
    """The model in evaluation mode on the default device, and what to run it with.

    Args:
        model_config: a hub entry, or a training's configuration with its weights.
        output_dir: of the evaluation.
        allow_unknown_keys: unknown keys in the training's configuration are a warning.
        datasets: dataset strings that are going to be used. If they are features in files, no model is needed: a
            stand-in that passes them on is returned.

    Returns:
        The model, and `{"autocast_dtype": ...}`.

    Raises:
        ValueError: neither or both of `dino_hub` and `config_file`, or an unknown hub entry.
    """
    stored = stored_model(datasets)
    if stored is not None:
        return stored.to(default_device()).eval(), {"autocast_dtype": torch.float}
    hub_name, config_file = model_config.dino_hub, model_config.config_file
    if hub_name is not None and config_file is None:
        model, autocast_dtype = _hub_model(hub_name, model_config.pretrained_weights), torch.float
    elif config_file is not None and hub_name is None:
        model, autocast_dtype = setup_and_build_model(
            config_file=config_file,
            pretrained_weights=model_config.pretrained_weights,
            output_dir=output_dir,
            allow_unknown_keys=allow_unknown_keys,
        )
    else:
        raise ValueError(
            "give the model either as model.dino_hub=<name> or as model.config_file=<training's config.yaml> with "
            f"model.pretrained_weights=<checkpoint>; got {model_config}"
        )
    model = model.to(default_device()).eval()
    return model, {"autocast_dtype": autocast_dtype}


def describe_model(model_config: ModelConfig) -> str | dict[str, Any]:
    """What head files say of the backbone: its name in the hub, or what a training's configuration says of its student.

    Raises:
        ValueError: neither `dino_hub` nor `config_file`.
    """
    if model_config.dino_hub is not None:
        return model_config.dino_hub
    if model_config.config_file is None:
        raise ValueError(f"the backbone has neither a name nor a configuration: {model_config}")
    from dinov3.configs import DinoV3SetupArgs, get_cfg_from_args
    from dinov3.models.build import describe_backbone

    config = get_cfg_from_args(DinoV3SetupArgs(config_file=model_config.config_file), strict=False)
    return describe_backbone(config.student)


def _hub_model(name: str, weights: str | None) -> nn.Module:
    """A model of this package's hub, or of the DINOv2 repository; with the released weights unless others are given."""
    if "dinov3" in name:
        from dinov3.hub import backbones
        from dinov3.hub.loading import load_backbone
        from dinov3.hub.registry import BACKBONES

        if name not in BACKBONES:
            known = ", ".join(sorted(BACKBONES))
            raise ValueError(f"model.dino_hub={name!r} is no backbone of the hub; known: {known}")
        entry = getattr(backbones, name, partial(load_backbone, name))  # rows of the table may have no function
        model: nn.Module = entry(weights=weights) if weights else entry()
        return model
    if "dinov2" in name:
        if weights:
            raise ValueError("model.pretrained_weights can't be used with a model of the DINOv2 repository")
        model = torch.hub.load("facebookresearch/dinov2", name)
        return model
    raise ValueError(f"model.dino_hub must name a dinov3 or dinov2 model, got {name!r}")


def setup_and_build_model(
    config_file: str,
    pretrained_weights: str | None = None,
    shard_unsharded_model: bool = False,
    output_dir: str = "",
    opts: Sequence[str] | None = None,
    *,
    allow_unknown_keys: bool = False,
    **ignored: Any,
) -> tuple[nn.Module, torch.dtype]:
    """The teacher of a training, in evaluation mode, and its autocast dtype.

    Only reads: neither the training's `config.yaml` nor anything else is written.

    Args:
        config_file: configuration of the training.
        pretrained_weights: a checkpoint file or directory; None or "": random weights.
        shard_unsharded_model: shard the model over the processes.
        output_dir: of the evaluation.
        opts: overrides `key=value` of the configuration.
        allow_unknown_keys: unknown keys are a warning.
        ignored: further arguments of older callers; they have no effect.

    Returns:
        The model, and bfloat16 if the training computed in it (`compute_precision.param_dtype=bf16`), else float32.
    """
    from dinov3.configs import DinoV3SetupArgs, get_cfg_from_args
    from dinov3.models import build_model_for_eval

    if ignored:
        logger.warning("setup_and_build_model: %s have no effect", ", ".join(ignored))
    args = DinoV3SetupArgs(
        config_file=config_file,
        pretrained_weights=pretrained_weights,
        shard_unsharded_model=shard_unsharded_model,
        output_dir=output_dir,
        opts=list(opts or []),
        allow_unknown_keys=allow_unknown_keys,
    )
    config = get_cfg_from_args(args, strict=False)  # what to do with unknown keys is in `args`
    model = build_model_for_eval(config, pretrained_weights, shard_unsharded_model=shard_unsharded_model)
    bf16 = config.compute_precision.param_dtype == "bf16"
    return model, torch.bfloat16 if bf16 else torch.float
