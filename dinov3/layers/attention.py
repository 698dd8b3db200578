"""Multi-head self-attention, with rotary positions (backbones) or causal (text)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.layers.fused import may_fuse
from dinov3.layers.linear import apply_linear, linear
from dinov3.layers.rope_position_encoding import RopeTables, rotate
from dinov3.utils.tensors import cat_keep_shapes, uncat_with_shapes


class LinearKMaskedBias(nn.Linear):
    """A linear layer for queries, keys and values whose bias is multiplied by `bias_mask`: no bias on the keys.

    The mask (ones, with zeros in the middle third) is a persistent buffer because released files contain it.
    """

    bias_mask: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if out_features % 3 != 0:
            raise ValueError(f"out_features holds queries, keys and values: got {out_features}, no multiple of 3")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.register_buffer("bias_mask", torch.empty_like(self.bias.detach()) if bias else None)
        self.reset_mask()

    def reset_mask(self) -> None:
        """Set the mask to ones, and to zeros in its middle third, the keys."""
        if self.bias_mask is not None:
            third = self.out_features // 3
            with torch.no_grad():
                self.bias_mask.fill_(1)
                self.bias_mask[third : 2 * third].zero_()

    def masked_bias(self) -> Tensor | None:
        """The bias that takes effect.

        Not kept between calls: sharded parameters change their values without any sign that a cache could check.
        """
        return None if self.bias_mask is None else self.bias * self.bias_mask.to(self.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return linear(x, self.weight, self.masked_bias())


class SelfAttention(nn.Module):
    """Bidirectional self-attention with rotary positions on queries and keys."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        mask_k_bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        make_qkv = LinearKMaskedBias if mask_k_bias else nn.Linear
        self.qkv = make_qkv(dim, 3 * dim, bias=qkv_bias, device=device)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, attn_bias: None = None, rope: RopeTables | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`.

        Args:
            x: tokens.
            attn_bias: must be None.
            rope: sine and cosine tables `[P, d]`, or `[B, 1, P, d]` per sample, of the last P tokens; those before
                keep their queries and keys.
            rows: numbers of the tokens that are wanted, out of B * N; then only their outputs `[M, D]` are computed.
        """
        _refuse_bias(attn_bias)
        attended = self.compute_attention(apply_linear(self.qkv, x), rope)
        if rows is not None:
            attended = attended.flatten(0, 1).index_select(0, rows)
        out: Tensor = self.proj_drop(apply_linear(self.proj, attended))
        return out

    def forward_list(
        self,
        x_list: Sequence[Tensor],
        attn_bias: None = None,
        rope_list: Sequence[RopeTables | None] | None = None,
    ) -> list[Tensor]:
        """`forward` of each entry, with one matrix product for all queries, keys and values and one for all outputs."""
        _refuse_bias(attn_bias)
        if rope_list is None or len(rope_list) != len(x_list):
            raise ValueError(f"rope_list needs one entry (tables or None) for each of the {len(x_list)} inputs")
        flat, shapes, counts = cat_keep_shapes(x_list)
        qkv_list = uncat_with_shapes(apply_linear(self.qkv, flat), shapes, counts)
        attended = [self.compute_attention(qkv, rope) for qkv, rope in zip(qkv_list, rope_list, strict=True)]
        flat, shapes, counts = cat_keep_shapes(attended)
        return uncat_with_shapes(self.proj_drop(apply_linear(self.proj, flat)), shapes, counts)

    def compute_attention(self, qkv: Tensor, rope: RopeTables | None = None) -> Tensor:
        """Attention of `[B, N, 3 * D]` queries, keys and values; returns `[B, N, D]`."""
        q, k, v = self._split_heads(qkv, rope)
        dropout = self.attn_drop if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)

    def qkv_bias(self) -> Tensor | None:
        """The bias of queries, keys and values that takes effect."""
        return self.qkv.masked_bias() if isinstance(self.qkv, LinearKMaskedBias) else self.qkv.bias

    def attention_weights(self, x: Tensor, rope: RopeTables | None = None) -> Tensor:
        """How much each token (third axis) looks at each other one (last axis): `[B, num_heads, N, N]`, rows sum to 1.

        For looking at only: `forward` never makes this matrix.

        Args:
            x: tokens `[B, N, D]`, as `forward` takes them.
            rope: as for `forward`.
        """
        q, k, _ = self._split_heads(self.qkv(x), rope)
        return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)

    def _split_heads(self, qkv: Tensor, rope: RopeTables | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both rotated) and values `[B, num_heads, N, d]` of `[B, N, 3 * D]`."""
        B, N, width = qkv.shape
        qkv = qkv.view(B, N, 3, self.num_heads, width // (3 * self.num_heads))  # [B, N, 3, A, d]
        if rope is not None and _records_heads_alone(qkv, rope):
            q, k, v = _SplitHeads.apply(qkv, *rope)
            return q, k, v
        qk, v = qkv[:, :, :2], qkv[:, :, 2]
        if rope is not None:
            qk = _apply_rope(qk, rope)
        q, k, v = (t.transpose(1, 2) for t in (qk[:, :, 0], qk[:, :, 1], v))
        return q, k, v


class CausalSelfAttention(nn.Module):
    """Self-attention for text, causal unless told otherwise, without rotary positions."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        _check_heads(dim, num_heads)
        self.dim = dim
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def init_weights(
        self, init_attn_std: float | None = None, init_proj_std: float | None = None, factor: float = 1.0
    ) -> None:
        """Normal weights, zero biases.

        Args:
            init_attn_std: of the query, key and value weights, default dim^-1/2.
            init_proj_std: of the output weights, default `init_attn_std * factor`.
            factor: see there; 1 / sqrt(2 * depth) keeps the residual stream of a deep network at the size of its input.
        """
        init_attn_std = init_attn_std or self.dim**-0.5
        nn.init.normal_(self.qkv.weight, std=init_attn_std)
        nn.init.normal_(self.proj.weight, std=init_proj_std or init_attn_std * factor)
        for layer in (self.qkv, self.proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, is_causal: bool = True) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; with `is_causal` a token sees itself and those before."""
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, A, N, d]
        dropout = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal)
        out: Tensor = self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))
        return out


class _SplitHeads(torch.autograd.Function):
    """Rotated queries, rotated keys and values `[B, A, N, d]` of `[B, N, 3, A, d]`, the three in memory of their own.

    The numbers are those of slices and `_apply_rope`. Autograd would keep the heads before the rotation too, and make
    a gradient full of zeros for every slice. The gradient of a rotation is the rotation back, by the negative angle.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, sin: Tensor, cos: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(sin, cos)
        B, N, _, A, d = qkv.shape
        heads = qkv.new_empty(3, B, N, A, d)
        heads[:2] = _apply_rope(qkv[:, :, :2], (sin, cos)).transpose(0, 2).transpose(1, 2)
        heads[2] = qkv[:, :, 2]
        return tuple(head.transpose(1, 2) for head in heads)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        sin, cos = ctx.saved_tensors
        grad_q, grad_k, grad_v = (grad.transpose(1, 2) for grad in grad_outputs)  # [B, N, A, d]
        B, N, A, d = grad_q.shape
        grad = grad_q.new_empty(B, N, 3, A, d)
        back = -sin.roll(sin.shape[-1] // 2, dims=-1)  # halves change places; they are equal in tables of positions
        for i, rotated in enumerate((grad_q, grad_k)):
            grad[:, :, i] = _apply_rope(rotated.unsqueeze(2), (back, cos)).squeeze(2)
        grad[:, :, 2] = grad_v
        return grad, None, None


def _records_heads_alone(qkv: Tensor, rope: RopeTables) -> bool:
    """Whether autograd records this call, and wants no gradient of the tables."""
    return may_fuse() and qkv.requires_grad and not any(table.requires_grad for table in rope)


def _apply_rope(qk: Tensor, rope: RopeTables) -> Tensor:
    """Rotate the last tokens of queries and keys `[B, N, 2, A, d]`, as many as the tables have rows."""
    # [P, d] -> [P, 1, 1, d];  [B, 1, P, d] -> [B, P, 1, 1, d]
    sin, cos = (t[:, None, None] if t.ndim == 2 else t.transpose(1, 2).unsqueeze(2) for t in rope)
    n_prefix = qk.shape[1] - sin.shape[-4]
    if n_prefix == 0:
        return rotate(qk, (sin, cos)).to(qk.dtype)
    # The prefix too takes the dtype of the tables and returns, as in the published models.
    rotated = rotate(qk[:, n_prefix:], (sin, cos))
    return torch.cat([qk[:, :n_prefix].to(sin.dtype), rotated], dim=1).to(qk.dtype)


def _check_heads(dim: int, num_heads: int) -> None:
    if dim % num_heads != 0:
        raise ValueError(f"dim ({dim}) must be a multiple of num_heads ({num_heads})")


def _refuse_bias(attn_bias: None) -> None:
    if attn_bias is not None:
        raise ValueError("attn_bias is not supported: pass None")
