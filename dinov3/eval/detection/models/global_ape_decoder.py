"""The decoder whose cross attention knows of positions by those of the tokens alone (absolute encodings)."""

from torch import Tensor

from dinov3.eval.detection.config import DetectionHeadConfig
from dinov3.eval.detection.models.cross_attention import CrossAttention, attend, padding_bias
from dinov3.eval.detection.models.decoder import GlobalDecoder, build_decoder

__all__ = ["GlobalCrossAttention", "GlobalDecoder", "build_global_ape_decoder"]


class GlobalCrossAttention(CrossAttention):
    """Attention from queries to all cells.

    Args:
        dim: width of all tokens.
        num_heads: a divisor of it.
    """

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor | None,
        key: Tensor,
        value: Tensor,
        spatial_shape: tuple[int, int],
        padding_mask: Tensor,
    ) -> Tensor:
        """Attend.

        Args:
            query: `[B, Q, C]`.
            reference_points: not used; in the other decoder the boxes of the queries.
            key, value: `[B, h * w, C]`.
            spatial_shape: not used; (h, w).
            padding_mask: booleans `[B, h * w]`, true on padding.

        Returns:
            `[B, Q, C]`.
        """
        q, k, v = self.heads(self.q(query)), self.heads(self.k(key)), self.heads(self.v(value))
        return self.output(attend(q, k, v, padding_bias(padding_mask)))


def build_global_ape_decoder(config: DetectionHeadConfig) -> GlobalDecoder:
    """The decoder of a configuration."""
    return build_decoder(config, lambda: GlobalCrossAttention(config.hidden_dim, config.nheads))
