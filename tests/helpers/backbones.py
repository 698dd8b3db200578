"""Small backbones with definite weights, in the shapes of the released ones."""

from typing import Any

import torch
from torch import Tensor

from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer
from tests.golden.fill import fill

# As the hub's models, but small. "like_7b": heads of 128 channels, no bias on q, k and v.
VITS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "swiglu": {"ffn_layer": "swiglu", "ffn_ratio": 6},
    "like_7b": {"embed_dim": 256, "ffn_layer": "swiglu64", "ffn_ratio": 3, "qkv_bias": False},
    "no_storage": {"n_storage_tokens": 0},
}


def tiny_vit(kind: str = "mlp", **options: Any) -> DinoVisionTransformer:
    """A vision transformer of two blocks in evaluation mode, its periods rounded as in released files."""
    settings: dict[str, Any] = {
        "embed_dim": 128,
        "depth": 2,
        "num_heads": 2,
        "ffn_ratio": 2,
        "n_storage_tokens": 4,
        "mask_k_bias": True,
        "layerscale_init": 1e-5,
        "norm_layer": "layernormbf16",
        "pos_embed_rope_rescale_coords": 2.0,
        "pos_embed_rope_dtype": "fp32",
    }
    model = DinoVisionTransformer(**(settings | VITS[kind] | options))
    model.init_weights()
    fill(model)
    with torch.no_grad():
        periods: Tensor = model.rope_embed.periods
        periods.copy_(periods.bfloat16().float())
    return model.eval()


def tiny_convnext(**options: Any) -> ConvNeXt:
    """A ConvNeXt of one or two blocks a stage, in evaluation mode."""
    settings: dict[str, Any] = {"depths": [1, 2, 1, 1], "dims": [8, 12, 16, 24], "layer_scale_init_value": 1e-6}
    model = ConvNeXt(**(settings | options))
    fill(model)
    return model.eval()


def assert_states_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same keys, and the same values bit for bit."""
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")
