"""Pre-norm transformer blocks."""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, overload

import torch
from torch import Tensor, nn

from dinov3.layers.attention import CausalSelfAttention, LinearKMaskedBias, SelfAttention
from dinov3.layers.drop_path import add_to_random_subset, draw_subset, rows_of_subset
from dinov3.layers.ffn_layers import Mlp
from dinov3.layers.fused import is_plain_norm, is_plain_scale, may_fuse, norm_linear, scaled_linear
from dinov3.layers.layer_scale import LayerScale
from dinov3.layers.linear import is_plain
from dinov3.layers.rope_position_encoding import RopeTables


class SelfAttentionBlock(nn.Module):
    """`x + ls1(attn(norm1(x)))`, then `x + ls2(mlp(norm2(x)))`, with stochastic depth over samples in training."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        attn_class: Callable[..., nn.Module] = SelfAttention,
        ffn_layer: Callable[..., nn.Module] = Mlp,
        mask_k_bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        """`init_values`: initial layer scale, None or 0 for none; `drop_path`: part of the batch a branch skips."""
        super().__init__()
        self.norm1 = norm_layer(dim, device=device)
        self.attn = attn_class(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=drop,
            mask_k_bias=mask_k_bias,
            device=device,
        )
        self.ls1 = LayerScale(dim, init_values=init_values, device=device) if init_values else nn.Identity()
        self.norm2 = norm_layer(dim, device=device)
        self.mlp = ffn_layer(
            in_features=dim,
            hidden_features=int(dim * ffn_ratio),
            act_layer=act_layer,
            drop=drop,
            bias=ffn_bias,
            device=device,
        )
        self.ls2 = LayerScale(dim, init_values=init_values, device=device) if init_values else nn.Identity()
        self.sample_drop_ratio = drop_path

    @overload
    def forward(self, x_or_x_list: Tensor, rope_or_rope_list: RopeTables | None = None) -> Tensor: ...

    @overload
    def forward(
        self,
        x_or_x_list: list[Tensor],
        rope_or_rope_list: Sequence[RopeTables | None] | None = None,
        rows_list: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor]: ...

    def forward(
        self,
        x_or_x_list: Tensor | list[Tensor],
        rope_or_rope_list: RopeTables | Sequence[RopeTables | None] | None = None,
        rows_list: Sequence[Tensor | None] | None = None,
    ) -> Tensor | list[Tensor]:
        """Tokens `[B, N, D]` to tokens, or a list of them (crops of several sizes) to a list.

        Args:
            x_or_x_list: tokens, or a list.
            rope_or_rope_list: sine and cosine tables, see `SelfAttention`; for a list one entry each, or None.
            rows_list: with a list only: per entry None, or the numbers of the tokens that are wanted, out of B * N.
                Of such an entry only their outputs `[M, D]` are computed, which are those that all tokens would give.

        Note: with stochastic depth each branch draws one permutation per entry: the attention branch for all entries
            first, then the feed-forward branch for all.
        """
        if isinstance(x_or_x_list, Tensor):
            return self._feed_forward(self._attention(x_or_x_list, rope_or_rope_list))  # type: ignore[arg-type]
        ropes = [None] * len(x_or_x_list) if rope_or_rope_list is None else rope_or_rope_list
        if rows_list is not None:
            return self._forward_rows(x_or_x_list, ropes, rows_list)  # type: ignore[arg-type]
        x_list = [self._attention(x, rope) for x, rope in zip(x_or_x_list, ropes, strict=True)]  # type: ignore[arg-type]
        return [self._feed_forward(x) for x in x_list]

    def _forward_rows(
        self, x_list: list[Tensor], ropes: Sequence[RopeTables | None], rows_list: Sequence[Tensor | None]
    ) -> list[Tensor]:
        entries = list(zip(x_list, rows_list, strict=True))
        attended = [
            self._attention(x, rope) if rows is None else self._attention_of_rows(x, rope, rows)
            for (x, rows), rope in zip(entries, ropes, strict=True)
        ]
        return [
            self._feed_forward(out) if rows is None else self._feed_forward_of_rows(out, rows, *x.shape[:2])
            for out, (x, rows) in zip(attended, entries, strict=True)
        ]

    def _attention_of_rows(self, x: Tensor, rope: RopeTables | None, rows: Tensor) -> Tensor:
        """`_attention`, all of whose tokens are seen, for some tokens `[M, D]`."""
        wanted = x.flatten(0, 1).index_select(0, rows)
        if not self._drops_samples:
            return self._add_attention(wanted, x, rope, rows)
        chosen, scale = draw_subset(x.shape[0], self.sample_drop_ratio, x.device)
        kept, rows_of_chosen = rows_of_subset(rows, x.shape[1], chosen, x.shape[0])
        branch = self._attention_branch(x.index_select(0, chosen), _rope_of(rope, chosen), rows_of_chosen)
        return torch.index_add(wanted, 0, kept, branch.to(wanted.dtype), alpha=scale)

    def _feed_forward_of_rows(self, wanted: Tensor, rows: Tensor, batch: int, n_tokens: int) -> Tensor:
        """`_feed_forward` of some tokens `[M, D]` of a batch."""
        if not self._drops_samples:
            return self._feed_forward(wanted)
        chosen, scale = draw_subset(batch, self.sample_drop_ratio, wanted.device)
        kept, _ = rows_of_subset(rows, n_tokens, chosen, batch)
        branch = self._feed_forward_branch(wanted.index_select(0, kept))
        return torch.index_add(wanted, 0, kept, branch.to(wanted.dtype), alpha=scale)

    def _attention(self, x: Tensor, rope: RopeTables | None) -> Tensor:
        if not self._drops_samples:
            return self._add_attention(x, x, rope)
        return add_to_random_subset(
            x, lambda samples, chosen: self._attention_branch(samples, _rope_of(rope, chosen)), self.sample_drop_ratio
        )

    def _feed_forward(self, x: Tensor) -> Tensor:
        if self._drops_samples:
            return add_to_random_subset(
                x, lambda samples, _: self._feed_forward_branch(samples), self.sample_drop_ratio
            )
        if may_fuse():
            return x + self._feed_forward_branch(x)
        return _add_scaled(x, self.mlp(self.norm2(x)), self.ls2)

    def _add_attention(self, to: Tensor, x: Tensor, rope: RopeTables | None, rows: Tensor | None = None) -> Tensor:
        if may_fuse():
            return to + self._attention_branch(x, rope, rows)
        return _add_scaled(to, self.attn(self.norm1(x), rope=rope, **_rows_argument(rows)), self.ls1)

    def _attention_branch(self, x: Tensor, rope: RopeTables | None, rows: Tensor | None = None) -> Tensor:
        """`ls1(attn(norm1(x)))`, of all tokens or of some (see `SelfAttention.forward`)."""
        norm, attn, scale = self.norm1, self.attn, self.ls1
        if not (may_fuse() and is_plain_norm(norm) and is_plain_scale(scale) and _is_plain_attention(attn)):
            out: Tensor = scale(attn(norm(x), rope=rope, **_rows_argument(rows)))
            return out
        attended = attn.compute_attention(norm_linear(x, norm, attn.qkv.weight, attn.qkv_bias()), rope)
        if rows is not None:
            attended = attended.flatten(0, 1).index_select(0, rows)
        return scaled_linear(attended, attn.proj.weight, attn.proj.bias, scale)

    def _feed_forward_branch(self, x: Tensor) -> Tensor:
        """`ls2(mlp(norm2(x)))`."""
        norm, mlp, scale = self.norm2, self.mlp, self.ls2
        if not (may_fuse() and is_plain_norm(norm) and is_plain_scale(scale) and _is_plain_mlp(mlp)):
            out: Tensor = scale(mlp(norm(x)))
            return out
        hidden = norm_linear(x, norm, mlp.fc1.weight, mlp.fc1.bias)
        return scaled_linear(hidden, mlp.fc2.weight, mlp.fc2.bias, scale, gelu=True)

    @property
    def _drops_samples(self) -> bool:
        return self.training and self.sample_drop_ratio > 0.0


class CausalSelfAttentionBlock(nn.Module):
    """Pre-norm block of the text tower: causal attention, then a feed-forward network."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_ratio: float = 4.0,
        ls_init_value: float | None = None,
        is_causal: bool = True,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        dropout_prob: float = 0.0,
    ) -> None:
        """`ls_init_value`: initial layer scale, None or 0 leaves it out."""
        super().__init__()
        self.dim = dim
        self.is_causal = is_causal
        self.ls1 = LayerScale(dim, init_values=ls_init_value) if ls_init_value else nn.Identity()
        self.attention_norm = norm_layer(dim)
        self.attention = CausalSelfAttention(dim, num_heads, attn_drop=dropout_prob, proj_drop=dropout_prob)
        self.ffn_norm = norm_layer(dim)
        self.feed_forward = Mlp(dim, int(dim * ffn_ratio), act_layer=act_layer, drop=dropout_prob)
        self.ls2 = LayerScale(dim, init_values=ls_init_value) if ls_init_value else nn.Identity()

    def init_weights(
        self,
        init_attn_std: float | None = None,
        init_proj_std: float | None = None,
        init_fc_std: float | None = None,
        factor: float = 1.0,
    ) -> None:
        """Normal weights, zero biases, norms 1 and 0, layer scales at their initial value.

        Args:
            init_attn_std: of the query, key and value weights, default dim^-1/2.
            init_proj_std: of both output weights, default `init_attn_std * factor`.
            init_fc_std: of the first feed-forward weight, default (2 * dim)^-1/2.
            factor: see `init_proj_std`.
        """
        init_attn_std = init_attn_std or self.dim**-0.5
        init_proj_std = init_proj_std or init_attn_std * factor
        self.attention.init_weights(init_attn_std, init_proj_std)
        nn.init.normal_(self.feed_forward.fc1.weight, std=init_fc_std or (2 * self.dim) ** -0.5)
        nn.init.normal_(self.feed_forward.fc2.weight, std=init_proj_std)
        nn.init.zeros_(self.feed_forward.fc1.bias)
        nn.init.zeros_(self.feed_forward.fc2.bias)
        for module in (self.attention_norm, self.ffn_norm, self.ls1, self.ls2):
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        x = _add_scaled(x, self.attention(self.attention_norm(x), self.is_causal), self.ls1)
        return _add_scaled(x, self.feed_forward(self.ffn_norm(x)), self.ls2)


def _add_scaled(x: Tensor, branch: Tensor, scale: nn.Module) -> Tensor:
    """`x + scale(branch)`, in one pass over memory for a layer scale."""
    return torch.addcmul(x, branch, scale.gamma) if isinstance(scale, LayerScale) else x + scale(branch)


def _rows_argument(rows: Tensor | None) -> dict[str, Tensor]:
    """Attention of other classes need not know of rows."""
    return {} if rows is None else {"rows": rows}


def _rope_of(rope: RopeTables | None, chosen: Tensor) -> RopeTables | None:
    """The tables of some samples: all have the same, or each its own."""
    return rope if rope is None or rope[0].ndim == 2 else (rope[0][chosen], rope[1][chosen])


def _is_plain_attention(attn: Any) -> TypeGuard[SelfAttention]:
    """Whether the attention is its two linear layers and nothing that `fused` doesn't know."""
    if not is_plain(attn, SelfAttention):
        return False
    qkv_is_plain = is_plain(attn.qkv, nn.Linear) or is_plain(attn.qkv, LinearKMaskedBias)
    return qkv_is_plain and is_plain(attn.proj, nn.Linear) and not _drops(attn.proj_drop)


def _is_plain_mlp(mlp: Any) -> TypeGuard[Mlp]:
    """Whether the network is two linear layers with an exact GELU between, and nothing that `fused` doesn't know."""
    if not (is_plain(mlp, Mlp) and is_plain(mlp.fc1, nn.Linear) and is_plain(mlp.fc2, nn.Linear)):
        return False
    return is_plain(mlp.act, nn.GELU) and mlp.act.approximate == "none" and not _drops(mlp.drop)


def _drops(dropout: nn.Dropout) -> bool:
    return dropout.training and dropout.p > 0
