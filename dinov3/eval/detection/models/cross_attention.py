"""What the two kinds of cross attention share: from tokens to heads, a soft mask on padding, from heads to tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Added to the logits of padding: large enough to leave it out, finite so that a query without any cell has a softmax.
PADDING_BIAS = -100.0


class CrossAttention(nn.Module):
    """Attention from queries to all cells; sub-classes say what is added to the logits.

    Args:
        dim: width of all tokens.
        num_heads: a divisor of it.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        """`[B, N, C]` to `[B, heads, N, C / heads]`."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def output(self, attended: Tensor) -> Tensor:
        """`[B, heads, N, C / heads]` to `[B, N, C]`, projected."""
        result: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return result


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(d) + bias) value, heads `[B, heads, N, d]`; the bias broadcasts with the logits."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))


def padding_bias(padding_mask: Tensor) -> Tensor:
    """What to add to the logits: float32 `[B, 1, 1, N]` for masks `[B, N]`, true on padding."""
    return (padding_mask.to(torch.float32) * PADDING_BIAS)[:, None, None]
