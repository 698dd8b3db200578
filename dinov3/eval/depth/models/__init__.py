"""Depth models: `encoder` (frozen backbone), `linear_head`, `dpt_head` and `features_to_depth` make a `depther`."""

from dinov3.eval.depth.config import PatchSizeAdaptationStrategy
from dinov3.eval.depth.models.depther import (
    Depther,
    build_depther,
    build_from_head,
    load_head_weights,
    make_depther_from_config,
    make_head,
)
from dinov3.eval.depth.models.dpt_head import DPTHead
from dinov3.eval.depth.models.embed import CenterPadding, StretchToMultiple
from dinov3.eval.depth.models.encoder import DinoVisionTransformerWrapper
from dinov3.eval.depth.models.features_to_depth import FeaturesToDepth
from dinov3.eval.depth.models.linear_head import LinearHead
from dinov3.models.features import BackboneLayersSet

__all__ = [
    "BackboneLayersSet",
    "CenterPadding",
    "DPTHead",
    "Depther",
    "DinoVisionTransformerWrapper",
    "FeaturesToDepth",
    "LinearHead",
    "PatchSizeAdaptationStrategy",
    "StretchToMultiple",
    "build_depther",
    "build_from_head",
    "load_head_weights",
    "make_depther_from_config",
    "make_head",
]
