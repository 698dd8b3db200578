"""Building blocks of the backbones and heads: attention, feed-forward, norms, position encodings, stochastic depth."""

from dinov3.layers.attention import CausalSelfAttention, LinearKMaskedBias, SelfAttention
from dinov3.layers.block import CausalSelfAttentionBlock, SelfAttentionBlock
from dinov3.layers.ffn_layers import Mlp, SwiGLUFFN
from dinov3.layers.fp8_linear import convert_linears_to_fp8
from dinov3.layers.layer_scale import LayerScale
from dinov3.layers.patch_embed import PatchEmbed
from dinov3.layers.rms_norm import RMSNorm
from dinov3.layers.rope_position_encoding import RopePositionEmbedding

__all__ = [
    "CausalSelfAttention",
    "CausalSelfAttentionBlock",
    "LayerScale",
    "LinearKMaskedBias",
    "Mlp",
    "PatchEmbed",
    "RMSNorm",
    "RopePositionEmbedding",
    "SelfAttention",
    "SelfAttentionBlock",
    "SwiGLUFFN",
    "convert_linears_to_fp8",
]
