"""Semantic segmentation of the hub: a Mask2Former head behind a ViT-Adapter on a frozen backbone.

    segmentor = torch.hub.load(repo, "dinov3_vit7b16_ms", weights="head.pth", backbone_weights="7b.pth")
    image = segmentor.make_transform(896)(Image.open("photo.jpg"))[None]
    scores = make_inference(  # dinov3.eval.segmentation.inference
        image, segmentor, "slide", "m2f", image.shape[-2:], 150, crop_size=(896, 896), stride=(596, 596)
    )
    classes = scores.argmax(dim=1)  # [1, H, W]

Importing this file needs torch and nothing else.
"""

import os
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dinov3.hub.loading import WeightsLike, load_backbone
from dinov3.hub.registry import NORMALIZATIONS, Weights
from dinov3.hub.released_heads import build_with_head, find_head
from dinov3.hub.transforms import make_dense_transform

if TYPE_CHECKING:
    from dinov3.eval.segmentation.models import FeatureDecoder

__all__ = ["SegmentorWeights", "dinov3_vit7b16_ms"]


class SegmentorWeights(Enum):
    """Data sets that heads were trained on."""

    ADE20K = "ADE20K"


SegmentorWeightsLike = SegmentorWeights | str | os.PathLike[str]

# First digits of the SHA-256 of the released heads.
_HASHES = {("dinov3_vit7b16", SegmentorWeights.ADE20K): "bf307cb1"}
# Backbones that the recipe is known for; the second one has no released head.
_BACKBONES = ("dinov3_vit7b16", "dinov3_vitl16")
_resolve = partial(find_head, SegmentorWeights, _HASHES, what="segmentation head", suffix="m2f_head")


def dinov3_vit7b16_ms(
    *,
    pretrained: bool = True,
    weights: SegmentorWeightsLike = SegmentorWeights.ADE20K,
    backbone_weights: WeightsLike = Weights.LVD1689M,
    check_hash: bool = False,
    autocast_dtype: torch.dtype = torch.bfloat16,
    **kwargs: Any,
) -> "FeatureDecoder":
    """The 150 classes of ADE20K: a Mask2Former head of 927 M parameters on ViT-7B/16.

    Args:
        pretrained: False: random weights, of the backbone too; nothing is read.
        weights: of the head: `SegmentorWeights.ADE20K` or its name, a path, or a `file://` or `http(s)://` address.
            Released files, and the `model_final.pth` of a training.
        backbone_weights: of the backbone; what `load_backbone` takes.
        check_hash: verify the SHA-256 digits in the names of both files, also of cached and local ones.
        autocast_dtype: what adapter and head compute in on accelerators; the pixel decoder always takes float32, the
            backbone bfloat16. CPUs compute in float32.
        kwargs: `hidden_dim` (2048) and `num_classes` (150) of a head of your own; `hash` replaces the digits in
            Meta's address.

    Returns:
        The model in evaluation mode, which `dinov3.eval.segmentation.inference.make_inference` takes. Its attribute
        `normalization` holds mean and standard deviation of the images it was trained on, and
        `make_transform(resize_size=None)` gives the transform.

    Raises:
        TypeError: another keyword.
        ValueError: weights that don't exist or do not fit; every tensor of the head must be there.
        FileNotFoundError, DownloadError: no weights there; the message says where they can be had.
    """
    return _make_dinov3_m2f_segmentor(
        backbone_name="dinov3_vit7b16",
        pretrained=pretrained,
        segmentor_weights=weights,
        backbone_weights=backbone_weights,
        check_hash=check_hash,
        autocast_dtype=autocast_dtype,
        **kwargs,
    )


def _make_dinov3_m2f_segmentor(
    *,
    backbone_name: str = "dinov3_vit7b16",
    pretrained: bool = True,
    segmentor_weights: SegmentorWeightsLike = SegmentorWeights.ADE20K,
    backbone_weights: WeightsLike = Weights.LVD1689M,
    check_hash: bool = False,
    autocast_dtype: torch.dtype = torch.bfloat16,
    hidden_dim: int = 2048,
    num_classes: int = 150,
    hash: str | None = None,
) -> "FeatureDecoder":
    """A segmentation model of the released recipe on one of the backbones that it is known for."""
    from dinov3.eval.segmentation.models import BackboneLayersSet, build_segmentation_decoder, load_head_state

    if backbone_name not in _BACKBONES:
        raise ValueError(f"no segmentation model on {backbone_name!r}; there are recipes for {', '.join(_BACKBONES)}")
    source = _resolve(backbone_name, segmentor_weights, hash) if pretrained else None
    build = partial(
        build_segmentation_decoder,
        backbone_out_layers=BackboneLayersSet.FOUR_EVEN_INTERVALS,
        decoder_type="m2f",
        hidden_dim=hidden_dim,
        num_classes=num_classes,
        autocast_dtype=autocast_dtype,
    )
    backbone = load_backbone(backbone_name, pretrained=pretrained, weights=backbone_weights, check_hash=check_hash)
    model = build_with_head(
        partial(build, backbone),
        load_head_state,
        source,
        what=f"segmentation head on {backbone_name}",
        check_hash=check_hash,
    )
    # The head was trained on ImageNet's statistics, whatever its backbone was trained on.
    normalization = NORMALIZATIONS[Weights.LVD1689M]
    model.normalization = normalization  # type: ignore[assignment]
    model.make_transform = partial(make_dense_transform, normalization=normalization)  # type: ignore[assignment]
    return model.eval()
