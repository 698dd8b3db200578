"""Segmentation heads and their files: a new head from a configuration, a trained one from `load_from`, and saving."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.checkpointer.heads import HEAD_FILE, HeadFile, is_head_file, read_head, save_head
from dinov3.checkpointer.weights import read_state_dict
from dinov3.eval.segmentation.config import DecoderConfig, SegmentationConfig
from dinov3.eval.segmentation.models import (
    FeatureDecoder,
    build_from_head,
    build_segmentation_decoder,
    head_state,
    load_head_state,
)
from dinov3.eval.setup import describe_model
from dinov3.models.features import BackboneLayersSet

logger = logging.getLogger("dinov3")

HUB_DECODER = "dinov3_vit7b16_ms"


def compute_dtype(config: SegmentationConfig) -> torch.dtype:
    """The dtype that backbone and head compute in, on devices that can."""
    dtype: torch.dtype = getattr(torch, config.model_dtype.value)
    return dtype


def make_decoder(backbone: nn.Module, config: SegmentationConfig) -> FeatureDecoder:
    """A new head, as configured, on a frozen backbone."""
    return build_segmentation_decoder(backbone, autocast_dtype=compute_dtype(config), **_decoder_options(config))


def _decoder_options(config: SegmentationConfig) -> dict[str, Any]:
    """`decoder_head` of the configuration as arguments of `build_segmentation_decoder`."""
    options = vars(config.decoder_head).copy()
    options["decoder_type"] = options.pop("type")
    return options


def adopt_head(config: SegmentationConfig) -> SegmentationConfig:
    """The configuration with what is known of the head that `load_from` names: head files say all of it."""
    if config.load_from == HUB_DECODER:
        head = replace(config.decoder_head, type="m2f", num_classes=150)
    elif config.load_from is not None and is_head_file(config.load_from):
        options = dict(_read_segmentation_head(config.load_from).config["decoder"])
        options["type"] = options.pop("decoder_type")
        options["backbone_out_layers"] = BackboneLayersSet(options["backbone_out_layers"])
        del options["autocast_dtype"]
        head = DecoderConfig(**options)
    else:
        return config
    return replace(config, decoder_head=head)


def _read_segmentation_head(path: str) -> HeadFile:
    head_file = read_head(path)
    if head_file.task != "segmentation":
        raise ValueError(f"load_from={path} is a head for {head_file.task}, expected segmentation")
    return head_file


def load_decoder(backbone: nn.Module | None, config: SegmentationConfig) -> FeatureDecoder:
    """The trained decoder that `load_from` names: the one of the hub, or a head on a backbone.

    Args:
        backbone: for heads from files.
        config: `load_from` is the hub's name; a file of `head.pth`'s kind, or the folder of its training, which knows
            its own `decoder_head`; a training's `model_final.pth`; or a flat state dict, as heads are released.

    Raises:
        ValueError: no backbone for a file, or tensors that don't fit.
    """
    assert config.load_from is not None
    if config.load_from == HUB_DECODER:
        return _hub_decoder(config)
    if backbone is None:
        raise ValueError(
            f"load_from={config.load_from} is a head without its backbone: give it with model.dino_hub=<name> or "
            f"model.config_file=<YAML>; only load_from={HUB_DECODER} brings its own"
        )
    if is_head_file(config.load_from):
        return build_from_head(backbone, _read_segmentation_head(config.load_from))
    decoder = make_decoder(backbone, config)
    try:
        load_head_state(decoder, read_state_dict(config.load_from))
    except ValueError as error:
        raise ValueError(f"load_from={config.load_from}: {error}") from error
    return decoder


def _hub_decoder(config: SegmentationConfig) -> FeatureDecoder:
    import dinov3.hub.segmentors

    options: dict[str, Any] = {"autocast_dtype": compute_dtype(config)}
    if config.model is not None and config.model.pretrained_weights:
        options["backbone_weights"] = config.model.pretrained_weights
    decoder: FeatureDecoder = getattr(dinov3.hub.segmentors, HUB_DECODER)(**options)
    return decoder


def save_segmentation_head(
    folder: Path, head: dict[str, Tensor], config: SegmentationConfig, class_names: list[str]
) -> Path:
    """Write `head.pth`, from which `dinov3.hub.load_head` and the predict command make the model again."""
    decoder = _decoder_options(config) | {
        "backbone_out_layers": config.decoder_head.backbone_out_layers.value,
        "autocast_dtype": config.model_dtype.value,
    }
    inference = {
        "img_size": _plain(config.transforms.eval.img_size),
        "mode": config.eval.mode,
        "crop_size": config.eval.crop_size,
        "stride": config.eval.stride,
    }
    mean, std = ((r / 255, g / 255, b / 255) for r, g, b in (config.transforms.mean, config.transforms.std))
    return save_head(
        folder / HEAD_FILE,
        HeadFile(
            task="segmentation",
            head=head,
            config={"decoder": decoder, "inference": inference},
            backbone="unknown" if config.model is None else describe_model(config.model),
            class_names=class_names,
            mean=mean,
            std=std,
        ),
    )


def _plain(size: Any) -> int | list[int] | None:
    return size if size is None or isinstance(size, int) else [int(side) for side in size]


class HeadState:
    """A decoder's head as a part of checkpoints."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder

    def state_dict(self) -> dict[str, Tensor]:
        """The head's tensors."""
        return head_state(self.decoder)

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take them back."""
        load_head_state(self.decoder, state_dict)
