"""The backbones of the hub, one function each; all take the options of `loading.load_backbone`.

    model = torch.hub.load("facebookresearch/dinov3", "dinov3_vits16", weights="~/dinov3_vits16_pretrain_lvd1689m.pth")
    features = model.forward_features(model.make_transform()(image)[None])

Pretrained models come in evaluation mode; call `.train()` before training them (which turns on random RoPE scaling).
"""

import urllib.parse
from pathlib import Path
from typing import Any, TypeVar, cast

from dinov3.hub.loading import WeightsLike, load_backbone
from dinov3.hub.registry import Weights
from dinov3.hub.transforms import make_transform
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer

__all__ = [
    "Weights",
    "convert_path_or_url_to_url",
    "dinov3_convnext_base",
    "dinov3_convnext_large",
    "dinov3_convnext_small",
    "dinov3_convnext_tiny",
    "dinov3_vit7b16",
    "dinov3_vitb16",
    "dinov3_vith16plus",
    "dinov3_vitl16",
    "dinov3_vitl16plus",
    "dinov3_vits16",
    "dinov3_vits16plus",
    "is_url",
    "make_transform",
]


_Model = TypeVar("_Model", DinoVisionTransformer, ConvNeXt)


def is_url(path: str) -> bool:
    """Whether `path` is an `https://`, `http://` or `file://` address."""
    return urllib.parse.urlparse(path).scheme in ("https", "http", "file")


def convert_path_or_url_to_url(path: str) -> str:
    """`path` as an address: unchanged if it is one, else `file://` and the absolute path (`~` expanded)."""
    return path if is_url(path) else Path(path).expanduser().resolve().as_uri()


def _load(
    kind: type[_Model], name: str, pretrained: bool, weights: WeightsLike, check_hash: bool, options: dict[str, Any]
) -> _Model:
    model = load_backbone(name, pretrained=pretrained, weights=weights, check_hash=check_hash, **options)
    return cast(_Model, model)


def dinov3_vits16(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """ViT-S/16: 384 wide, 12 blocks, 21.6 M parameters.

    In evaluation mode if pretrained. See `load_backbone` for arguments and errors.
    """
    return _load(DinoVisionTransformer, "dinov3_vits16", pretrained, weights, check_hash, kwargs)


def dinov3_vits16plus(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """ViT-S+/16: 384 wide, 12 blocks, SwiGLU, 28.7 M parameters.

    In evaluation mode if pretrained. See `load_backbone` for arguments and errors.
    """
    return _load(DinoVisionTransformer, "dinov3_vits16plus", pretrained, weights, check_hash, kwargs)


def dinov3_vitb16(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """ViT-B/16: 768 wide, 12 blocks, 85.7 M parameters.

    In evaluation mode if pretrained. See `load_backbone` for arguments and errors.
    """
    return _load(DinoVisionTransformer, "dinov3_vitb16", pretrained, weights, check_hash, kwargs)


def dinov3_vitl16(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """ViT-L/16: 1024 wide, 24 blocks, 303 M parameters; `LVD1689M` or `SAT493M`.

    In evaluation mode if pretrained. See `load_backbone` for arguments and errors.
    """
    return _load(DinoVisionTransformer, "dinov3_vitl16", pretrained, weights, check_hash, kwargs)


def dinov3_vitl16plus(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """ViT-L+/16: 1024 wide, 24 blocks, SwiGLU, 404 M parameters.

    In evaluation mode if pretrained. See `load_backbone` for arguments and errors.
    """
    return _load(DinoVisionTransformer, "dinov3_vitl16plus", pretrained, weights, check_hash, kwargs)


def dinov3_vith16plus(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """ViT-H+/16: 1280 wide, 32 blocks, SwiGLU, 841 M parameters.

    In evaluation mode if pretrained. See `load_backbone` for arguments and errors.
    """
    return _load(DinoVisionTransformer, "dinov3_vith16plus", pretrained, weights, check_hash, kwargs)


def dinov3_vit7b16(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> DinoVisionTransformer:
    """ViT-7B/16: 4096 wide, 40 blocks, SwiGLU, 6,716 M parameters; `LVD1689M` or `SAT493M`.

    In evaluation mode if pretrained. See `load_backbone` for arguments and errors.
    """
    return _load(DinoVisionTransformer, "dinov3_vit7b16", pretrained, weights, check_hash, kwargs)


def dinov3_convnext_tiny(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> ConvNeXt:
    """ConvNeXt-Tiny: 768 wide, 27.8 M parameters.

    In evaluation mode if pretrained. See `load_backbone` for arguments and errors.
    """
    model = load_backbone(
        "dinov3_convnext_tiny", pretrained=pretrained, weights=weights, check_hash=check_hash, **kwargs
    )
    return cast(ConvNeXt, model)


def dinov3_convnext_small(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> ConvNeXt:
    """ConvNeXt-Small: 768 wide, 49.5 M parameters.

    In evaluation mode if pretrained. See `load_backbone` for arguments and errors.
    """
    model = load_backbone(
        "dinov3_convnext_small", pretrained=pretrained, weights=weights, check_hash=check_hash, **kwargs
    )
    return cast(ConvNeXt, model)


def dinov3_convnext_base(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> ConvNeXt:
    """ConvNeXt-Base: 1024 wide, 87.6 M parameters.

    In evaluation mode if pretrained. See `load_backbone` for arguments and errors.
    """
    model = load_backbone(
        "dinov3_convnext_base", pretrained=pretrained, weights=weights, check_hash=check_hash, **kwargs
    )
    return cast(ConvNeXt, model)


def dinov3_convnext_large(
    *, pretrained: bool = True, weights: WeightsLike = Weights.LVD1689M, check_hash: bool = False, **kwargs: Any
) -> ConvNeXt:
    """ConvNeXt-Large: 1536 wide, 196 M parameters.

    In evaluation mode if pretrained. See `load_backbone` for arguments and errors.
    """
    model = load_backbone(
        "dinov3_convnext_large", pretrained=pretrained, weights=weights, check_hash=check_hash, **kwargs
    )
    return cast(ConvNeXt, model)
