"""The text tower of dino.txt: a text transformer, perhaps more blocks, pooling, projection."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor, nn

from dinov3.eval.text.text_transformer import TextTransformer
from dinov3.eval.text.tower import TokenHead, Tower
from dinov3.layers import CausalSelfAttentionBlock

Pooler = Literal["first", "last", "argmax"]

_TRANSFORMER_KEYS = (
    "context_length",
    "vocab_size",
    "dim",
    "num_heads",
    "num_layers",
    "ffn_ratio",
    "is_causal",
    "ls_init_value",
    "dropout_prob",
)


class TextHead(TokenHead):
    """Blocks and a norm on all tokens, then a linear projection; any of them may be left out.

    Args:
        input_dim, embed_dim: widths before and after.
        num_heads, num_blocks: of the blocks; without blocks there is no norm either.
        block_drop_prob: dropout in the blocks.
        is_causal: of the blocks' attention.
        use_linear_projection: project even if the widths are equal.
    """

    def __init__(
        self,
        input_dim: int,
        embed_dim: int,
        num_heads: int,
        num_blocks: int,
        block_drop_prob: float = 0.0,
        is_causal: bool = False,
        use_linear_projection: bool = False,
    ) -> None:
        super().__init__()
        self.input_dim = input_dim
        self.blocks = nn.ModuleList(
            CausalSelfAttentionBlock(input_dim, num_heads, is_causal=is_causal, dropout_prob=block_drop_prob)
            for _ in range(num_blocks)
        )
        self.ln_final = nn.LayerNorm(input_dim) if num_blocks else nn.Identity()
        projects = use_linear_projection or input_dim != embed_dim
        self.linear_projection = nn.Linear(input_dim, embed_dim, bias=False) if projects else nn.Identity()

    def init_weights(self) -> None:
        """Random weights, the norm 1 and 0."""
        block: Any
        for block in self.blocks:
            block.init_weights()
        if isinstance(self.ln_final, nn.LayerNorm):
            self.ln_final.reset_parameters()
        self.init_projection()


class TextTower(Tower):
    """A text transformer and a head on its tokens; one token stands for the text.

    Args:
        backbone: from token ids to features of all tokens, with the attributes `embed_dim` and `num_heads`.
        freeze_backbone: no gradients for the backbone, which stays in evaluation mode.
        embed_dim: width of the text features.
        num_head_blocks, head_blocks_is_causal, head_blocks_drop_prob, use_linear_projection: see `TextHead`.
        tokens_pooler_type: which token: the `"first"`, the `"last"`, or `"argmax"`, the first of those with the
            largest id (the end of the text, in the vocabulary of CLIP).

    Raises:
        ValueError: unknown pooler.
    """

    head: TextHead

    def __init__(
        self,
        backbone: nn.Module,
        freeze_backbone: bool,
        embed_dim: int,
        num_head_blocks: int,
        head_blocks_is_causal: bool,
        head_blocks_drop_prob: float,
        tokens_pooler_type: str,
        use_linear_projection: bool,
    ) -> None:
        super().__init__()
        if tokens_pooler_type not in get_args(Pooler):
            raise ValueError(
                f"unknown tokens_pooler_type {tokens_pooler_type!r}; expected one of {', '.join(get_args(Pooler))}"
            )
        self.tokens_pooler_type = tokens_pooler_type
        self.freeze_backbone = freeze_backbone
        self.backbone = backbone
        self.head = TextHead(
            int(backbone.embed_dim),  # type: ignore[arg-type]
            embed_dim,
            int(backbone.num_heads),  # type: ignore[arg-type]
            num_head_blocks,
            block_drop_prob=head_blocks_drop_prob,
            is_causal=head_blocks_is_causal,
            use_linear_projection=use_linear_projection,
        )
        self.freeze()

    def forward(self, token_indices: Tensor) -> Tensor:
        """Token ids `[B, N]` to text features `[B, embed_dim]`."""
        tokens: Tensor = self.head(self.backbone(token_indices))
        if self.tokens_pooler_type == "first":
            return tokens[:, 0]
        if self.tokens_pooler_type == "last":
            return tokens[:, -1]
        largest = token_indices.argmax(dim=1)[:, None, None]
        return tokens.gather(1, largest.expand(-1, 1, tokens.shape[-1])).squeeze(1)

    def graph_outputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """What an exported graph gives: `text_features` `[B, embed_dim]`."""
        return {"text_features": self(tokens)}


def build_text_backbone(cfg: Any) -> TextTransformer:
    """The text transformer that a configuration describes (`configs/text_backbone.yaml`).

    Args:
        cfg: a mapping, or an object with attributes: the arguments of `TextTransformer` by name.

    Raises:
        ValueError: a value is missing.
    """
    given: dict[str, Any] = {
        key: cfg.get(key) if isinstance(cfg, Mapping) else getattr(cfg, key, None) for key in _TRANSFORMER_KEYS
    }
    if missing := [key for key in _TRANSFORMER_KEYS[:7] if given[key] is None]:
        raise ValueError(f"the text backbone's configuration lacks {', '.join(missing)}")
    return TextTransformer(**given | {"dropout_prob": given["dropout_prob"] or 0.0})


def build_text_model(
    *,
    embed_dim: int,
    backbone: nn.Module,
    freeze_backbone: bool = False,
    num_head_blocks: int = 0,
    head_blocks_is_causal: bool = False,
    head_blocks_drop_prob: float = 0.0,
    tokens_pooler_type: str = "first",
    use_linear_projection: bool = False,
) -> TextTower:
    """A text tower around a backbone; arguments and errors as in `TextTower`."""
    return TextTower(
        backbone,
        freeze_backbone,
        embed_dim,
        num_head_blocks,
        head_blocks_is_causal,
        head_blocks_drop_prob,
        tokens_pooler_type,
        use_linear_projection,
    )
