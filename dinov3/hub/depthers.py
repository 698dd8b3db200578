"""Depth models of the hub: a DPT head on a frozen backbone, from images to metres.

    depther = torch.hub.load(repo, "dinov3_vit7b16_dd", weights="head.pth", backbone_weights="7b.pth")
    depth = depther(depther.make_transform()(image)[None])  # [1, 1, H, W] metres

Models come in evaluation mode and compute in float32 unless `autocast_dtype` says otherwise.
"""

import os
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dinov3.hub.loading import NoInit, WeightsLike, load_backbone
from dinov3.hub.registry import BASE_URL, NORMALIZATIONS, Normalization, Weights
from dinov3.hub.transforms import make_dense_transform

if TYPE_CHECKING:
    from dinov3.eval.depth.config import DecoderConfig
    from dinov3.eval.depth.models import Depther

__all__ = ["DepthWeights", "dinov3_vit7b16_dd", "dinov3_vitl16_chmv2"]

CHMV2_NORMALIZATION = Normalization((0.420, 0.411, 0.296), (0.213, 0.156, 0.143))


class DepthWeights(Enum):
    """What heads were trained on: synthetic indoor and outdoor scenes, or canopy heights from the air (version 2)."""

    CHMV2 = "CHMV2"
    SYNTHMIX = "SYNTHMIX"


DepthWeightsLike = DepthWeights | str | os.PathLike[str]

# Head -> (path of the file below BASE_URL, first digits of its SHA-256).
_RELEASED = {
    DepthWeights.SYNTHMIX: ("dinov3_vit7b16/dinov3_vit7b16_synthmix_dpt_head", "02040be1"),
    DepthWeights.CHMV2: ("chmv2/dinov3_vitl16_chmv2_dpt_head", "3703d643"),
}


def dinov3_vit7b16_dd(
    *,
    pretrained: bool = True,
    weights: DepthWeightsLike = DepthWeights.SYNTHMIX,
    backbone_weights: WeightsLike = Weights.LVD1689M,
    check_hash: bool = False,
    autocast_dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> "Depther":
    """Metric depth, 0.001 to 100 m: a DPT head of 231 M parameters on ViT-7B/16.

    Args:
        pretrained: False: random weights, of the backbone too.
        weights: of the head: `DepthWeights.SYNTHMIX`, or a path or address of a head file.
        backbone_weights: of the backbone; see `load_backbone`.
        check_hash: verify the SHA-256 digits in the names of both files.
        autocast_dtype: what it computes in on accelerators.
        kwargs: `depth_range=(min, max)` [metres] instead of (0.001, 100); `hash` replaces that of the released head.

    Returns:
        The model in evaluation mode. Its attribute `normalization` holds mean and standard deviation of the images it
        takes, and `make_transform()` gives the transform from an image.

    Raises:
        TypeError: another keyword.
        ValueError, FileNotFoundError, DownloadError: as for backbones.
    """
    depth_range = kwargs.pop("depth_range", None)
    config = _get_depther_config("dinov3_vit7b16", depth_range=depth_range)
    return _make_dinov3_dpt_depther(
        "dinov3_vit7b16",
        config,
        pretrained=pretrained,
        weights=weights,
        backbone_weights=backbone_weights,
        check_hash=check_hash,
        autocast_dtype=autocast_dtype,
        released=DepthWeights.SYNTHMIX,
        normalization=NORMALIZATIONS[Weights.LVD1689M],
        **kwargs,
    )


def dinov3_vitl16_chmv2(
    pretrained: bool = True,
    weights: DepthWeightsLike = DepthWeights.CHMV2,
    backbone_weights: WeightsLike = Weights.SAT493M,
    check_hash: bool = False,
    autocast_dtype: torch.dtype = torch.float32,
) -> "Depther":
    """Canopy height above ground, up to 96 m: a DPT head of 34 M parameters on the satellite ViT-L/16.

    Takes aerial images at their native resolution. Arguments, attributes and errors are those of `dinov3_vit7b16_dd`.
    """
    from dinov3.eval.depth.config import DecoderConfig

    config = DecoderConfig(
        min_depth=0.001,
        max_depth=96.0,
        bins_strategy="chmv2_mixlog",
        norm_strategy="chmv2_mixlog",
        type="dpt",
        n_output_channels=256,
        backbone_out_layers=[5, 11, 17, 23],  # unlike FOUR_EVEN_INTERVALS, which takes 4
        use_backbone_norm=True,
        use_batchnorm=False,
        use_cls_token=True,
        head_kwargs={"n_hidden_channels": 128, "use_bias": True, "projection_after_fusion": False},
    )
    return _make_dinov3_dpt_depther(
        "dinov3_vitl16",
        config,
        pretrained=pretrained,
        weights=weights,
        backbone_weights=backbone_weights,
        check_hash=check_hash,
        autocast_dtype=autocast_dtype,
        released=DepthWeights.CHMV2,
        normalization=CHMV2_NORMALIZATION,
    )


def _get_depther_config(backbone_name: str, depth_range: tuple[float, float] | None = None) -> "DecoderConfig":
    """The head of `dinov3_vit7b16_dd`, and the same for a ViT-L.

    Args:
        backbone_name: name of a hub entry, 7B or ViT-L.
        depth_range: smallest and largest depth [metres]; None: 0.001 and 100.

    Raises:
        ValueError: another backbone, for which there is no such head, or no pair of depths.
    """
    from dinov3.eval.depth.config import DecoderConfig

    if "7b" in backbone_name:
        layers, width = [9, 19, 29, 39], 2048
    elif "vitl" in backbone_name:
        layers, width = [4, 11, 17, 23], 1024
    else:
        raise ValueError(f"no depth head was released for {backbone_name!r}, only for ViT-7B and ViT-L")
    if depth_range is not None and len(depth_range) != 2:
        raise ValueError(f"depth_range is (smallest, largest) in metres, got {depth_range!r}")
    min_depth, max_depth = depth_range or (0.001, 100.0)
    return DecoderConfig(
        min_depth=min_depth,
        max_depth=max_depth,
        bins_strategy="linear",
        norm_strategy="linear",
        type="dpt",
        n_output_channels=256,
        backbone_out_layers=layers,
        use_backbone_norm=True,
        use_batchnorm=True,
        use_cls_token=False,
        head_kwargs={"channels": 512, "post_process_channels": [width] * 4},
    )


def _make_dinov3_dpt_depther(
    backbone_name: str,
    config: "DecoderConfig",
    *,
    pretrained: bool,
    weights: DepthWeightsLike,
    backbone_weights: WeightsLike,
    check_hash: bool,
    autocast_dtype: torch.dtype,
    released: DepthWeights,
    normalization: Normalization,
    hash: str | None = None,
) -> "Depther":
    """Backbone and head, both with released, own or random weights."""
    from dinov3.eval.depth.models import load_head_weights, make_depther_from_config

    source = _resolve(weights, released, hash) if pretrained else None
    backbone = load_backbone(backbone_name, pretrained=pretrained, weights=backbone_weights, check_hash=check_hash)
    if source is None:
        depther = make_depther_from_config(backbone, config, autocast_dtype=autocast_dtype)
    else:
        with NoInit():
            depther = make_depther_from_config(backbone, config, autocast_dtype=autocast_dtype)
        load_head_weights(depther.decoder, source, check_hash=check_hash)
    depther.decoder_config = config  # type: ignore[assignment]
    depther.normalization = normalization  # type: ignore[assignment]
    depther.make_transform = partial(make_dense_transform, normalization=normalization, square=True)  # type: ignore[assignment]
    return depther


def _resolve(weights: DepthWeightsLike, released: DepthWeights, hash: str | None) -> str | os.PathLike[str]:
    """Where the head is."""
    member = DepthWeights.__members__.get(weights.upper()) if isinstance(weights, str) else weights
    if isinstance(member, DepthWeights):
        if member is not released:
            raise ValueError(f"this model has no weights {member.name}; released are: {released.name}")
        path, released_hash = _RELEASED[member]
        return f"{BASE_URL}/{path}-{hash or released_hash}.pth"
    if not isinstance(weights, str | os.PathLike):
        raise TypeError(f"got {weights!r} for weights, expected {released.name}, a path or an address")
    return weights
