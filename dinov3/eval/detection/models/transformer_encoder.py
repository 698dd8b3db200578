"""The encoder: self-attention among all cells of the feature map.

Source: Carion et al., End-to-End Object Detection with Transformers (2020).
"""

from collections.abc import Callable
from copy import deepcopy

import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.eval.detection.config import DetectionHeadConfig

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "glu": F.glu}


class TransformerEncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual connection and a LayerNorm.

    Args:
        d_model: width of the tokens.
        nhead: heads.
        dim_feedforward: width of the hidden layer (of its halves, for "glu").
        dropout: on both residual branches and on the hidden layer; none in the attention.
        activation: "relu", "gelu" or "glu" (one half of the hidden layer gates the other).
        normalize_before: norms before the branches instead of after the sums.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        normalize_before: bool = False,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}; got {activation!r}")
        self.self_attn = nn.MultiheadAttention(d_model, nhead, batch_first=True)
        self.linear1 = nn.Linear(d_model, dim_feedforward * (2 if activation == "glu" else 1))
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.activation, self.normalize_before = _ACTIVATIONS[activation], normalize_before

    def forward(self, src: Tensor, pos: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        """Tokens `[B, N, C]` with positions `[B, N, C]` to tokens; keys `[B, N]` that are true are not attended to."""
        if self.normalize_before:
            src = src + self._attend(self.norm1(src), pos, src_key_padding_mask)
            return src + self._feed_forward(self.norm2(src))
        src = self.norm1(src + self._attend(src, pos, src_key_padding_mask))
        normed: Tensor = self.norm2(src + self._feed_forward(src))
        return normed

    def _attend(self, x: Tensor, pos: Tensor, padding: Tensor | None) -> Tensor:
        query = x + pos
        attended = self.self_attn(query, query, x, key_padding_mask=padding, need_weights=False)[0]
        result: Tensor = self.dropout(attended)
        return result

    def _feed_forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.activation(self.linear1(x)))
        result: Tensor = self.dropout(self.linear2(hidden))
        return result


class TransformerEncoder(nn.Module):
    """Layers one after another.

    Args:
        encoder_layer: copied for each layer.
        num_layers: how many.
        norm: applied at the end.
    """

    def __init__(self, encoder_layer: nn.Module, num_layers: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(deepcopy(encoder_layer) for _ in range(num_layers))
        self.norm = norm

    def forward(self, src: Tensor, pos: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        """As a layer's."""
        for layer in self.layers:
            src = layer(src, pos, src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


def build_transformer_encoder(config: DetectionHeadConfig) -> TransformerEncoder:
    """The post-norm encoder of a detector."""
    layer = TransformerEncoderLayer(config.hidden_dim, config.nheads, config.dim_feedforward, config.encoder_dropout)
    return TransformerEncoder(layer, config.num_encoder_layers)
