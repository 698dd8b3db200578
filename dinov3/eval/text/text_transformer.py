"""The text transformer of dino.txt: from token ids to one feature per token."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from dinov3.layers import CausalSelfAttentionBlock


class TextTransformer(nn.Module):
    """Token and position embeddings, pre-norm blocks, a final norm.

    Padding is not masked: with causal attention no token sees the padding behind it.

    Args:
        context_length: longest text, in tokens.
        vocab_size: number of token ids.
        dim: width of the tokens.
        num_heads, num_layers, ffn_ratio: of the blocks.
        is_causal: whether a token sees only itself and those before it.
        ls_init_value: initial layer scale; None or 0: none.
        act_layer, norm_layer: of the blocks (`norm_layer` of the end, too).
        dropout_prob: of the embeddings, of attention and of both branches of a block.

    Raises:
        ValueError: `dim` is no multiple of `num_heads`.

    Source: Jose et al., "DINOv2 Meets Text" (2024), section 3; the network is that of Radford et al., "Learning
        Transferable Visual Models From Natural Language Supervision" (2021), section 2.4.
    """

    def __init__(
        self,
        context_length: int,
        vocab_size: int,
        dim: int,
        num_heads: int,
        num_layers: int,
        ffn_ratio: float,
        is_causal: bool,
        ls_init_value: float | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        dropout_prob: float = 0.0,
    ) -> None:
        super().__init__()
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.embed_dim = dim
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, dim))
        self.dropout = nn.Dropout(dropout_prob)
        self.blocks = nn.ModuleList(
            CausalSelfAttentionBlock(
                dim,
                num_heads,
                ffn_ratio=ffn_ratio,
                ls_init_value=ls_init_value,
                is_causal=is_causal,
                act_layer=act_layer,
                norm_layer=norm_layer,
                dropout_prob=dropout_prob,
            )
            for _ in range(num_layers)
        )
        self.ln_final = norm_layer(dim)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def init_weights(self) -> None:
        """Random weights; those that end a residual branch are smaller in deeper networks."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        block: Any
        for block in self.blocks:
            block.init_weights(factor=(2 * self.num_layers) ** -0.5)
        cast(Any, self.ln_final).reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids `[B, N]` to features `[B, N, D]`.

        Raises:
            ValueError: more tokens than the context holds.
        """
        n_tokens = tokens.shape[1]
        if n_tokens > self.context_length:
            raise ValueError(f"got texts of {n_tokens} tokens, the context holds {self.context_length}: cut them")
        x = self.dropout(self.token_embedding(tokens) + self.positional_embedding[:n_tokens])
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.ln_final(x)
        return out

    def wrap_units(self) -> list[nn.Module]:
        """The blocks: what sharding, compilation and activation checkpointing act on one by one."""
        return list(self.blocks)
