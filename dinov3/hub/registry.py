"""The one table of what can be loaded: entry points, architectures, released weights, their addresses and
statistics.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from torch import nn

from dinov3.models.convnext import get_convnext_arch
from dinov3.models.vision_transformer import vit_7b, vit_base, vit_huge2, vit_large, vit_small

BASE_URL = "https://dl.fbaipublicfiles.com/dinov3"


class Weights(Enum):
    """Data sets that backbones were pretrained on: web images, or satellite images."""

    LVD1689M = "LVD1689M"
    SAT493M = "SAT493M"


class Normalization(NamedTuple):
    """Mean and standard deviation of red, green and blue, for images in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


NORMALIZATIONS: Mapping[Weights, Normalization] = {
    Weights.LVD1689M: Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    Weights.SAT493M: Normalization((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
}


@dataclass(frozen=True)
class BackboneEntry:
    """One backbone of the hub.

    Attributes:
        name: of the entry point and in file names.
        hashes: first digits of the SHA-256 of each released file.
        build: constructor of the architecture.
        options: what the entry point passes to it; a user's options win.
        untied_local_norm: weights whose file holds `local_cls_norm`.
        versioned: whether addresses may carry a version.
        on_hugging_face: whether Meta publishes the weights there too.
    """

    name: str
    hashes: Mapping[Weights, str]
    build: Callable[..., nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    untied_local_norm: tuple[Weights, ...] = ()
    versioned: bool = False
    on_hugging_face: bool = True

    def url(self, weights: Weights, *, hash: str | None, version: str | None = None) -> str:
        """Where Meta serves the file; without `hash` the name has none."""
        suffix = (f"_{version}" if version and self.versioned else "") + (f"-{hash}" if hash else "")
        return f"{BASE_URL}/{self.name}/{self.name}_pretrain_{weights.value.lower()}{suffix}.pth"

    def hugging_face_names(self) -> dict[str, Weights]:
        """Repositories with this backbone's weights."""
        short = self.name.removeprefix("dinov3_").replace("_", "-")
        weights = self.hashes if self.on_hugging_face else ()
        return {f"facebook/dinov3-{short}-pretrain-{w.value.lower()}": w for w in weights}


_VIT = {
    "patch_size": 16,
    "pos_embed_rope_base": 100.0,
    "pos_embed_rope_normalize_coords": "separate",
    "pos_embed_rope_rescale_coords": 2.0,
    "pos_embed_rope_dtype": "fp32",
    "qkv_bias": True,
    "layerscale_init": 1e-5,
    "norm_layer": "layernormbf16",
    "ffn_layer": "mlp",
    "n_storage_tokens": 4,
    "mask_k_bias": True,
}
_VIT_PLUS = _VIT | {"ffn_layer": "swiglu", "ffn_ratio": 6.0}
_VIT_7B = _VIT | {"ffn_layer": "swiglu64", "ffn_ratio": 3.0, "qkv_bias": False}
_LVD, _SAT = Weights.LVD1689M, Weights.SAT493M

_ENTRIES = (
    BackboneEntry("dinov3_vits16", {_LVD: "08c60483"}, vit_small, _VIT),
    BackboneEntry("dinov3_vits16plus", {_LVD: "4057cbaa"}, vit_small, _VIT_PLUS),
    BackboneEntry("dinov3_vitb16", {_LVD: "73cec8be"}, vit_base, _VIT),
    BackboneEntry("dinov3_vitl16", {_LVD: "8aa4cbdd", _SAT: "eadcf0ff"}, vit_large, _VIT, untied_local_norm=(_SAT,)),
    BackboneEntry("dinov3_vitl16plus", {_LVD: "46503df0"}, vit_large, _VIT_PLUS, versioned=True, on_hugging_face=False),
    BackboneEntry("dinov3_vith16plus", {_LVD: "7c1da9a5"}, vit_huge2, _VIT_PLUS, versioned=True),
    BackboneEntry(
        "dinov3_vit7b16", {_LVD: "a955f4ea", _SAT: "a6675841"}, vit_7b, _VIT_7B, untied_local_norm=(_LVD, _SAT)
    ),
    *(
        BackboneEntry(f"dinov3_convnext_{size}", {_LVD: hash}, get_convnext_arch(f"convnext_{size}"))
        for size, hash in {"tiny": "21b726bb", "small": "296db49d", "base": "801f2ba9", "large": "61fa432d"}.items()
    ),
)

BACKBONES: Mapping[str, BackboneEntry] = {entry.name: entry for entry in _ENTRIES}
