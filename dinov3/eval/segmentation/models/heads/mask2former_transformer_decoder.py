"""Transformer decoder of Mask2Former: queries that look for segments, each within the mask it found so far.

Source: Cheng et al., Masked-attention Mask Transformer for Universal Image Segmentation (2022), sections 3.2 and 3.3.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.layers.linear import apply_linear, linear
from dinov3.layers.sine_position_encoding import PositionEmbeddingSine

N_LEVELS = 3
"""Scales that the layers look at in turn."""


class MultiScaleMaskedTransformerDecoder(nn.Module):
    """Classes and masks of a set of queries.

    Args:
        in_channels: of the maps.
        mask_classification: True; masks without classes are not supported.
        num_classes: K; the logits have one more, "no object".
        hidden_dim: width of the decoder.
        num_queries: Q.
        nheads: attention heads.
        dim_feedforward: hidden width of the feed-forward networks.
        dec_layers: number of layers.
        pre_norm: normalise the input of each part instead of the sum with its output.
        mask_dim: width of the mask features.
        enforce_input_project: map the inputs linearly also where they are as wide as the decoder.

    Raises:
        ValueError: `mask_classification` is False, or the heads don't divide the width.
    """

    def __init__(
        self,
        in_channels: int,
        mask_classification: bool = True,
        *,
        num_classes: int,
        hidden_dim: int,
        num_queries: int,
        nheads: int,
        dim_feedforward: int,
        dec_layers: int,
        pre_norm: bool,
        mask_dim: int,
        enforce_input_project: bool,
    ) -> None:
        super().__init__()
        if not mask_classification:
            raise ValueError("mask_classification=False is not supported: every mask has a class")
        self.num_queries = num_queries
        self.position = PositionEmbeddingSine(hidden_dim // 2, normalize=True)
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(hidden_dim, nheads, pre_norm) for _ in range(dec_layers)
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(hidden_dim, nheads, pre_norm) for _ in range(dec_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FFNLayer(hidden_dim, dim_feedforward, pre_norm) for _ in range(dec_layers)
        )
        self.post_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(N_LEVELS, hidden_dim)
        project = enforce_input_project or in_channels != hidden_dim
        self.input_proj = nn.ModuleList(
            nn.Conv2d(in_channels, hidden_dim, kernel_size=1) if project else nn.Sequential() for _ in range(N_LEVELS)
        )
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim, 3)
        for conv in self.input_proj:
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_uniform_(conv.weight, a=1)
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Sequence[Tensor], mask_features: Tensor) -> dict[str, Any]:
        """Predictions of the queries.

        Args:
            x: three maps `[B, in_channels, h, w]`, coarsest first.
            mask_features: `[B, mask_dim, h1, w1]`.

        Returns:
            `pred_logits` `[B, Q, K + 1]` and `pred_masks` (logits) `[B, Q, h1, w1]` after the last layer, and
            `aux_outputs`: a list of the same two of the initial queries and after every layer but the last.

        Raises:
            ValueError: another number of maps.
        """
        if len(x) != N_LEVELS:
            raise ValueError(f"expected {N_LEVELS} maps, got {len(x)}")
        sizes = [level.shape[-2:] for level in x]
        positions = [_cells(self.position(level)) for level in x]
        memories = [
            _cells(project(level)) + embed
            for project, level, embed in zip(self.input_proj, x, self.level_embed.weight, strict=True)
        ]
        query_pos = self.query_embed.weight
        out = self.query_feat.weight.expand(mask_features.shape[0], -1, -1)

        outputs = [self._predict(out, mask_features)]
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for i, (cross_attention, self_attention, ffn) in enumerate(layers):
            level = i % N_LEVELS
            allowed = attention_mask(outputs[-1]["pred_masks"], sizes[level])
            out = cross_attention(out, memories[level], positions[level], query_pos, allowed)
            out = ffn(self_attention(out, query_pos))
            outputs.append(self._predict(out, mask_features))
        return {**outputs[-1], "aux_outputs": outputs[:-1]}

    def _predict(self, out: Tensor, mask_features: Tensor) -> dict[str, Tensor]:
        z = self.post_norm(out)
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embed(z), mask_features)
        return {"pred_logits": self.class_embed(z), "pred_masks": masks}


def attention_mask(mask_logits: Tensor, size: Sequence[int]) -> Tensor:
    """Where queries may look, booleans `[B, 1, Q, h * w]`: inside their masks, or everywhere if a mask is empty.

    Args:
        mask_logits: `[B, Q, H, W]`; no gradient flows through.
        size: (h, w) of the map that is looked at.
    """
    logits = F.interpolate(mask_logits.detach(), size=tuple(size), mode="bilinear", align_corners=False)
    inside = (logits.sigmoid() >= 0.5).flatten(2)
    return (inside | ~inside.any(dim=-1, keepdim=True)).unsqueeze(1)


def _cells(x: Tensor) -> Tensor:
    """`[B, C, h, w]` to `[B, h * w, C]`."""
    return x.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention with the parameters of `nn.MultiheadAttention`, and a mask that all heads share."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"{n_heads} heads don't divide the width {dim}")
        self.n_heads = n_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """`[B, Q, C]`, from queries `[B, Q, C]` to keys and values `[B, S, C]`; `allowed`: `[B, 1, Q, S]`."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            linear(x, weight, bias).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return apply_linear(self.out_proj, out.transpose(1, 2).flatten(2))


class CrossAttentionLayer(nn.Module):
    """Queries look at the cells of one level."""

    def __init__(self, dim: int, n_heads: int, pre_norm: bool) -> None:
        super().__init__()
        self.multihead_attn = Attention(dim, n_heads)
        self.norm = nn.LayerNorm(dim)
        self.pre_norm = pre_norm

    def forward(
        self, out: Tensor, memory: Tensor, position: Tensor, query_pos: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """`[B, Q, C]` to the same; `memory` and `position`: `[B, S, C]`; `query_pos`: `[Q, C]`."""
        query = self.norm(out) if self.pre_norm else out
        read = self.multihead_attn(query + query_pos, memory + position, memory, allowed)
        return out + read if self.pre_norm else self.norm(out + read)


class SelfAttentionLayer(nn.Module):
    """Queries look at each other."""

    def __init__(self, dim: int, n_heads: int, pre_norm: bool) -> None:
        super().__init__()
        self.self_attn = Attention(dim, n_heads)
        self.norm = nn.LayerNorm(dim)
        self.pre_norm = pre_norm

    def forward(self, out: Tensor, query_pos: Tensor) -> Tensor:
        """`[B, Q, C]` to the same; `query_pos`: `[Q, C]`."""
        query = self.norm(out) if self.pre_norm else out
        read = self.self_attn(query + query_pos, query + query_pos, query)
        return out + read if self.pre_norm else self.norm(out + read)


class FFNLayer(nn.Module):
    """Two linear layers on each query."""

    def __init__(self, dim: int, hidden_dim: int, pre_norm: bool) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.pre_norm = pre_norm
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, out: Tensor) -> Tensor:
        """`[B, Q, C]` to the same."""
        x = self.norm(out) if self.pre_norm else out
        x = apply_linear(self.linear2, F.relu(apply_linear(self.linear1, x)))
        return out + x if self.pre_norm else self.norm(out + x)


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        dims = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in zip(dims, dims[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., input_dim]` to `[..., output_dim]`."""
        for layer in self.layers[:-1]:
            x = F.relu(apply_linear(layer, x))
        return apply_linear(self.layers[-1], x)
