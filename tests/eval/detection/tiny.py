"""A detector of the size of a test."""

from typing import Any

from dinov3.eval.detection.config import DetectionHeadConfig
from dinov3.eval.detection.models.detr import PlainDETR, build_model
from dinov3.models.vision_transformer import DinoVisionTransformer

TINY_VIT: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 16,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "ffn_ratio": 2,
    "n_storage_tokens": 2,
    "mask_k_bias": True,
    "layerscale_init": 1e-5,
    "norm_layer": "layernormbf16",
    "pos_embed_rope_rescale_coords": 2.0,
    "pos_embed_rope_dtype": "fp32",
}


def tiny_backbone(**options: Any) -> DinoVisionTransformer:
    """A vision transformer of four blocks, with the random weights it starts from."""
    model = DinoVisionTransformer(**(TINY_VIT | options))
    model.init_weights()
    return model.eval()


def tiny_config(**options: Any) -> DetectionHeadConfig:
    """A head of width 32 with two decoder layers."""
    settings: dict[str, Any] = {
        "num_classes": 5,
        "hidden_dim": 32,
        "nheads": 4,
        "dim_feedforward": 48,
        "dec_layers": 2,
        "num_encoder_layers": 1,
        "decoder_rpe_hidden_dim": 16,
        "num_queries_one2one": 10,
        "num_queries_one2many": 6,
        "proposal_min_size": 16,
        "topk": 20,
    }
    return DetectionHeadConfig(**(settings | options))


def tiny_detector(**options: Any) -> PlainDETR:
    """Head and backbone together."""
    return build_model(tiny_backbone(), tiny_config(**options))
