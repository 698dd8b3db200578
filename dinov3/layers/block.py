"""Pre-norm transformer blocks."""

from collections.abc import Callable, Sequence
from typing import overload

import torch
from torch import Tensor, nn

from dinov3.layers.attention import CausalSelfAttention, SelfAttention
from dinov3.layers.drop_path import add_to_random_subset, draw_subset, rows_of_subset
from dinov3.layers.ffn_layers import Mlp
from dinov3.layers.layer_scale import LayerScale
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
            return _add_scaled(wanted, self.attn(self.norm1(x), rope=rope, rows=rows), self.ls1)
        chosen, scale = draw_subset(x.shape[0], self.sample_drop_ratio, x.device)
        if rope is not None and rope[0].ndim == 4:
            rope = rope[0][chosen], rope[1][chosen]
        kept, rows_of_chosen = rows_of_subset(rows, x.shape[1], chosen, x.shape[0])
        branch = self.ls1(self.attn(self.norm1(x.index_select(0, chosen)), rope=rope, rows=rows_of_chosen))
        return torch.index_add(wanted, 0, kept, branch.to(wanted.dtype), alpha=scale)

    def _feed_forward_of_rows(self, wanted: Tensor, rows: Tensor, batch: int, n_tokens: int) -> Tensor:
        """`_feed_forward` of some tokens `[M, D]` of a batch."""
        if not self._drops_samples:
            return _add_scaled(wanted, self.mlp(self.norm2(wanted)), self.ls2)
        chosen, scale = draw_subset(batch, self.sample_drop_ratio, wanted.device)
        kept, _ = rows_of_subset(rows, n_tokens, chosen, batch)
        branch = self.ls2(self.mlp(self.norm2(wanted.index_select(0, kept))))
        return torch.index_add(wanted, 0, kept, branch.to(wanted.dtype), alpha=scale)

    def _attention(self, x: Tensor, rope: RopeTables | None) -> Tensor:
        if not self._drops_samples:
            return _add_scaled(x, self.attn(self.norm1(x), rope=rope), self.ls1)

        def branch(samples: Tensor, indices: Tensor) -> Tensor:
            per_sample = rope is not None and rope[0].ndim == 4
            chosen = (rope[0][indices], rope[1][indices]) if rope is not None and per_sample else rope
            out: Tensor = self.ls1(self.attn(self.norm1(samples), rope=chosen))
            return out

        return add_to_random_subset(x, branch, self.sample_drop_ratio)

    def _feed_forward(self, x: Tensor) -> Tensor:
        if not self._drops_samples:
            return _add_scaled(x, self.mlp(self.norm2(x)), self.ls2)

        def branch(samples: Tensor, _: Tensor) -> Tensor:
            out: Tensor = self.ls2(self.mlp(self.norm2(samples)))
            return out

        return add_to_random_subset(x, branch, self.sample_drop_ratio)

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
