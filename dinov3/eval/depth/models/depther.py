"""The depth model: encoder, decoder, features to depth; and how it is built."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dinov3.checkpointer.files import read_file
from dinov3.checkpointer.heads import HEAD_FILE, HeadFile, read_head
from dinov3.checkpointer.sources import local_path
from dinov3.checkpointer.weights import load_weights, read_state_dict
from dinov3.eval.depth.config import DecoderConfig, PatchSizeAdaptationStrategy
from dinov3.eval.depth.models.dpt_head import DPTHead
from dinov3.eval.depth.models.encoder import DinoVisionTransformerWrapper
from dinov3.eval.depth.models.features_to_depth import FeaturesToDepth
from dinov3.eval.depth.models.linear_head import LinearHead, resize
from dinov3.models.features import BackboneLayersSet
from dinov3.utils.dtype import autocast_to

TASK = "depth"


class Depther(nn.Module):
    """Metric depth of normalised images.

    Args:
        encoder: from images to features.
        decoder: from features to logits.
        min_depth, max_depth, bins_strategy, norm_strategy: see `FeaturesToDepth`.
        autocast_dtype: what encoder and decoder compute in, whatever the autocast around the call; float32: no
            autocast. A CPU computes in float32.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        min_depth: float = 0.001,
        max_depth: float = 80,
        bins_strategy: str = "linear",
        norm_strategy: str = "linear",
        autocast_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.features_to_depth = FeaturesToDepth(min_depth, max_depth, bins_strategy, norm_strategy)
        self.autocast_dtype = autocast_dtype

    def forward(self, x: Tensor) -> Tensor:
        """Depth [metres] `[B, 1, H, W]` of images `[B, 3, H', W']`, in float32, at the resolution of the decoder.

        Callers resize it to their images (bilinear).
        """
        with autocast_to(x.device, self.autocast_dtype):
            depth: Tensor = self.features_to_depth(self.decoder(self.encoder(x)))
        return depth

    def graph_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """What an exported graph gives: `depth` [metres] `[B, 1, H, W]` at the size of the images."""
        return {"depth": resize(self(images), images.shape[-2:])}


def make_head(
    embed_dims: int | Sequence[int],
    n_output_channels: int,
    use_batchnorm: bool,
    use_cls_token: bool,
    head_type: str = "linear",
    **dpt_kwargs: Any,
) -> nn.Module:
    """A linear or DPT head.

    Args:
        embed_dims: width of each level; a number: one level.
        n_output_channels: K.
        use_batchnorm: normalise features over the batch.
        use_cls_token: let the class token take part (in a DPT head: readout "project" instead of "ignore").
        head_type: "linear" or "dpt".
        dpt_kwargs: further arguments of the head.

    Raises:
        ValueError: unknown type. TypeError: an argument that the head doesn't have.
    """
    widths = [embed_dims] if isinstance(embed_dims, int) else list(embed_dims)
    kwargs: dict[str, Any] = {"n_output_channels": n_output_channels, "use_batchnorm": use_batchnorm} | dpt_kwargs
    if head_type == "linear":
        return LinearHead(widths, use_cls_token=use_cls_token, **kwargs)
    if head_type == "dpt":
        return DPTHead(widths, **({"readout_type": "project" if use_cls_token else "ignore"} | kwargs))
    raise ValueError(f"unknown head_type {head_type!r}; known: linear, dpt")


def build_depther(
    backbone: nn.Module,
    backbone_out_layers: Sequence[int] | BackboneLayersSet | str,
    n_output_channels: int,
    use_backbone_norm: bool = False,
    use_batchnorm: bool = False,
    use_cls_token: bool = False,
    adapt_to_patch_size: PatchSizeAdaptationStrategy | str = PatchSizeAdaptationStrategy.CENTER_PADDING,
    head_type: str = "dpt",
    autocast_dtype: torch.dtype = torch.float32,
    min_depth: float = 0.001,
    max_depth: float = 10.0,
    bins_strategy: str = "linear",
    norm_strategy: str = "linear",
    **head_kwargs: Any,
) -> Depther:
    """A depth model in evaluation mode, its head with random weights.

    See `DinoVisionTransformerWrapper` for the backbone's arguments, `make_head` for those of the head,
    `FeaturesToDepth` for those of the bins. Nothing is moved: the head is made on torch's default device.
    """
    encoder = DinoVisionTransformerWrapper(backbone, backbone_out_layers, use_backbone_norm, adapt_to_patch_size)
    decoder = make_head(
        encoder.embed_dims, n_output_channels, use_batchnorm, use_cls_token, head_type=head_type, **head_kwargs
    )
    return Depther(encoder, decoder, min_depth, max_depth, bins_strategy, norm_strategy, autocast_dtype).eval()


def make_depther_from_config(
    backbone: nn.Module,
    config: DecoderConfig,
    checkpoint_path: str | os.PathLike[str] | None = None,
    autocast_dtype: torch.dtype = torch.float32,
) -> Depther:
    """A depth model of a `DecoderConfig`, on the backbone's device, in evaluation mode.

    Args:
        backbone: not copied.
        config: the head.
        checkpoint_path: weights of the head, see `load_head_weights`; None: random ones.
        autocast_dtype: see `Depther`.

    Raises:
        ValueError: weights that don't fit the head, all of it.
    """
    depther = build_depther(
        backbone,
        config.backbone_out_layers,
        config.n_output_channels,
        use_backbone_norm=config.use_backbone_norm,
        use_batchnorm=config.use_batchnorm,
        use_cls_token=config.use_cls_token,
        adapt_to_patch_size=config.adapt_to_patch_size,
        head_type=config.type,
        autocast_dtype=autocast_dtype,
        min_depth=config.min_depth,
        max_depth=config.max_depth,
        bins_strategy=config.bins_strategy,
        norm_strategy=config.norm_strategy,
        **config.head_kwargs,
    )
    depther.decoder.to(next(backbone.parameters()).device)
    if checkpoint_path is not None:
        load_head_weights(depther.decoder, checkpoint_path)
    return depther


def load_head_weights(decoder: nn.Module, source: str | os.PathLike[str], *, check_hash: bool | None = None) -> None:
    """Load a head, all of it or nothing.

    Args:
        decoder: the head, not on the meta device.
        source: a path or address: a released head (bare tensors by name), a training checkpoint (`{"model": …}`), a
            head file, or the output folder of a training, which holds one.
        check_hash: see `dinov3.checkpointer.sources.local_path`.

    Raises:
        ValueError: the file is none of these or doesn't fit.
    """
    path = local_path(source, check_hash=check_hash)
    state = read_head(path).head if _is_head_file(path) else read_state_dict(path)
    try:
        load_weights(decoder, state)
    except ValueError as error:
        raise ValueError(f"depth head {os.fspath(source)}: {error}") from error


def _is_head_file(path: Path) -> bool:
    """Whether a file, or a folder, is one that `save_head` wrote."""
    if path.is_dir():
        return (path / HEAD_FILE).is_file()
    content = read_file(path)
    return isinstance(content, dict) and {"format", "head"} <= content.keys()


def build_from_head(backbone: nn.Module, head_file: HeadFile) -> Depther:
    """The depth model of a head file, in evaluation mode, on the backbone's device.

    Raises:
        ValueError: the head doesn't fit the backbone.
    """
    depther = make_depther_from_config(backbone, decoder_config_of(head_file.config))
    load_weights(depther.decoder, head_file.head)
    return depther


def decoder_config_of(values: dict[str, Any]) -> DecoderConfig:
    """The configuration from the plain values of a head file, see `plain_decoder_config`."""
    values = dict(values)
    values["adapt_to_patch_size"] = PatchSizeAdaptationStrategy(values["adapt_to_patch_size"])
    return DecoderConfig(**values)


def plain_decoder_config(config: DecoderConfig) -> dict[str, Any]:
    """The configuration as numbers, text, lists and dictionaries of them."""
    values = {name: value for name, value in vars(config).items()}
    layers = config.backbone_out_layers
    if isinstance(layers, BackboneLayersSet):
        values["backbone_out_layers"] = layers.value
    elif not isinstance(layers, str):
        values["backbone_out_layers"] = [int(i) for i in cast(Sequence[int], layers)]
    values["adapt_to_patch_size"] = PatchSizeAdaptationStrategy(config.adapt_to_patch_size).value
    values["head_kwargs"] = {k: list(v) if isinstance(v, tuple) else v for k, v in config.head_kwargs.items()}
    return values
