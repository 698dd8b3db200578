"""To and from Hugging Face transformers: build a model from a folder, write one, convert state dicts."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dinov3.checkpointer.export import export_backbone, hf_config
from dinov3.checkpointer.files import read_config
from dinov3.checkpointer.layouts import to_hf, to_meta
from dinov3.checkpointer.sources import local_path
from dinov3.checkpointer.weights import load_weights, read_weights
from dinov3.hub.loading import NoInit
from dinov3.hub.registry import NORMALIZATIONS, Normalization, Weights
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer
from dinov3.utils.files import read_json

__all__ = ["build_model_from_config", "export_hf_model", "hf_config", "load_hf_model", "to_hf", "to_meta"]

# A config.json by a stranger must not make this machine build without end.
_LARGEST = {
    "num_hidden_layers": 1000,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "num_attention_heads": 1 << 16,
    "num_register_tokens": 1 << 16,
    "num_channels": 1 << 16,
    "patch_size": 1 << 10,
    "depths": 1000,
    "hidden_sizes": 1 << 16,
}
_NORM_BY_EPS = {1e-6: "layernorm", 1e-5: "layernormbf16"}


def load_hf_model(source: str | os.PathLike[str], *, round_periods: bool = True) -> nn.Module:
    """The backbone in a Hugging Face folder, in evaluation mode; `normalization` holds what its images need.

    Args:
        source: folder with `config.json` and `model.safetensors` (or its shards), or the name of a repository in the
            local Hugging Face cache.
        round_periods: RoPE periods as in the files that Meta released (rounded to bfloat16), or exact as in
            transformers.

    Raises:
        ValueError: not a DINOv3 model, or a damaged folder.
    """
    folder = local_path(source)
    config = read_config(folder if folder.is_dir() else folder.parent)
    if not config:
        raise ValueError(f"{folder} has no config.json of a DINOv3 model (model_type dinov3_vit or dinov3_convnext)")
    try:
        with NoInit():
            model = build_model_from_config(config)
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{folder}: config.json describes no network that can be built: {error}") from error
    load_weights(model, read_weights(folder, like=model, round_periods=round_periods))
    model.normalization = _statistics(folder)  # type: ignore[assignment]
    return model.eval()


def _statistics(folder: Path) -> Normalization:
    """What the folder's `preprocessor_config.json` says; without one, what transformers takes."""
    file = (folder if folder.is_dir() else folder.parent) / "preprocessor_config.json"
    if not file.exists():
        return NORMALIZATIONS[Weights.LVD1689M]
    content = read_json(file)
    try:
        (a, b, c), (d, e, f) = (map(float, content[key]) for key in ("image_mean", "image_std"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} has no image_mean and image_std: {error!r}") from error
    return Normalization((a, b, c), (d, e, f))


def export_hf_model(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write `config.json`, `model.safetensors` and `preprocessor_config.json` for transformers; see `export_backbone`.

    Mean and standard deviation are the model's `normalization` (hub models have it), else those of ImageNet, which
    trainings use by default.
    """
    normalization = getattr(model, "normalization", NORMALIZATIONS[Weights.LVD1689M])
    return export_backbone(model, folder, "hf", statistics=tuple(normalization))


def build_model_from_config(config: Mapping[str, Any]) -> nn.Module:
    """The architecture that a Hugging Face `config.json` describes; its weights are not initialised.

    Raises:
        ValueError: not a DINOv3 model, or options that our models do not have.
    """
    kind = config.get("model_type")
    for key, largest in _LARGEST.items():
        values = config[key] if isinstance(config.get(key), list) else [config.get(key, 1)]
        if not all(isinstance(value, int) and 0 <= value <= largest for value in values):
            raise ValueError(f"{key} is {config[key]}, expected at most {largest:,}")
    if kind == "dinov3_convnext":
        return ConvNeXt(
            in_chans=config.get("num_channels", 3),
            depths=list(config.get("depths", (3, 3, 9, 3))),
            dims=list(config.get("hidden_sizes", (96, 192, 384, 768))),
            drop_path_rate=config.get("drop_path_rate", 0.0),
            layer_scale_init_value=config.get("layer_scale_init_value", 1e-6),
        )
    if kind != "dinov3_vit":
        raise ValueError(f"model_type is {kind!r}, expected 'dinov3_vit' or 'dinov3_convnext'")
    return _build_vit(config)


def _build_vit(config: Mapping[str, Any]) -> DinoVisionTransformer:
    # Defaults are those of transformers' configuration class: a config.json may leave them out.
    dim, hidden = config.get("hidden_size", 384), config.get("intermediate_size", 1536)
    gated = config.get("use_gated_mlp", False)
    eps, qkv_bias = config.get("layer_norm_eps", 1e-5), config.get("query_bias", True)
    if eps not in _NORM_BY_EPS:
        raise ValueError(f"layer_norm_eps is {eps}, expected one of {', '.join(map(str, _NORM_BY_EPS))}")
    activation, expected = config.get("hidden_act", "gelu"), "silu" if gated else "gelu"
    if activation != expected:
        raise ValueError(f"hidden_act is {activation!r}, expected {expected!r} with use_gated_mlp {gated}")
    if gated and hidden % 8:
        raise ValueError(f"intermediate_size is {hidden}, expected a multiple of 8 for a gated MLP")
    if config.get("value_bias", True) != qkv_bias:
        raise ValueError("query_bias and value_bias differ; our attention has both or none")
    return DinoVisionTransformer(
        img_size=config.get("image_size", 224),
        patch_size=config.get("patch_size", 16),
        in_chans=config.get("num_channels", 3),
        embed_dim=dim,
        depth=config.get("num_hidden_layers", 12),
        num_heads=config.get("num_attention_heads", 6),
        # The hidden width is int(dim * ratio), for SwiGLU two thirds of that: half a unit guards against rounding.
        ffn_ratio=((1.5 * hidden if gated else hidden) + 0.5) / dim,
        ffn_layer="swiglu" if gated else "mlp",
        ffn_bias=config.get("mlp_bias", True),
        qkv_bias=qkv_bias,
        mask_k_bias=qkv_bias and not config.get("key_bias", False),
        proj_bias=config.get("proj_bias", True),
        norm_layer=_NORM_BY_EPS[eps],
        layerscale_init=config.get("layerscale_value", 1.0) or 1.0,
        drop_path_rate=config.get("drop_path_rate", 0.0),
        n_storage_tokens=config.get("num_register_tokens", 0),
        pos_embed_rope_base=config.get("rope_theta", 100.0),
        pos_embed_rope_shift_coords=config.get("pos_embed_shift"),
        pos_embed_rope_jitter_coords=config.get("pos_embed_jitter"),
        pos_embed_rope_rescale_coords=config.get("pos_embed_rescale", 2.0),
        pos_embed_rope_dtype="fp32",
    )
