"""The vision tower of dino.txt: a vision backbone, perhaps more blocks, pooling, projection."""

from functools import partial
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from dinov3.eval.text.tower import TokenHead, Tower
from dinov3.layers import LayerScale, SelfAttentionBlock, SwiGLUFFN
from dinov3.models.backbone import Backbone

Pooler = Literal["mean", "max"]

_LAYER_SCALE = 1e-5


class BackboneFeatures(NamedTuple):
    """What the backbone gives for a batch of images.

    Attributes:
        class_token: `[B, D]`, of the last layer.
        patch_tokens: `[B, P, D]`.
        register_tokens: `[B, R, D]`.
    """

    class_token: Tensor
    patch_tokens: Tensor
    register_tokens: Tensor


class VisionFeatures(NamedTuple):
    """What the tower gives for a batch of images.

    Attributes:
        features: `[B, embed_dim]`.
        patch_tokens: after the head `[B, P, D']`.
        backbone_patch_tokens: `[B, P, D]`.
    """

    features: Tensor
    patch_tokens: Tensor
    backbone_patch_tokens: Tensor


class VisionHead(TokenHead):
    """Blocks and a norm on all tokens, then a linear projection; any of them may be left out.

    The blocks know no positions, although the backbone does: the released weights were trained so.

    Args:
        input_dim: width of the tokens.
        embed_dim: width of the image features that are made from the output.
        num_heads, num_blocks: of the blocks; without blocks there is no norm either.
        blocks_drop_path: stochastic depth.
        use_class_token, use_patch_tokens: what image features are made of; with both, each has half of `embed_dim`.
        use_linear_projection: project even if the widths are equal.

    Raises:
        ValueError: neither kind of token is used, or `embed_dim` can't be halved.
    """

    def __init__(
        self,
        input_dim: int,
        embed_dim: int,
        num_heads: int,
        num_blocks: int,
        blocks_drop_path: float,
        use_class_token: bool,
        use_patch_tokens: bool,
        use_linear_projection: bool,
    ) -> None:
        super().__init__()
        n_parts = int(use_class_token) + int(use_patch_tokens)
        if n_parts == 0:
            raise ValueError("image features need the class token, the patch tokens, or both: both are switched off")
        if embed_dim % n_parts:
            raise ValueError(f"embed_dim is shared by class and patch tokens and must be even, got {embed_dim}")
        self.input_dim = input_dim
        self.ln_final = nn.LayerNorm(input_dim) if num_blocks else nn.Identity()
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(
                input_dim,
                num_heads,
                ffn_layer=partial(SwiGLUFFN, align_to=64),
                init_values=_LAYER_SCALE,
                drop_path=blocks_drop_path,
            )
            for _ in range(num_blocks)
        )
        projects = use_linear_projection or n_parts * input_dim != embed_dim
        self.linear_projection = nn.Linear(input_dim, embed_dim // n_parts, bias=False) if projects else nn.Identity()

    def init_weights(self) -> None:
        """Random weights, zero biases, norms 1 and 0, layer scales 1e-5."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | LayerScale):
                module.reset_parameters()
        self.init_projection()


class VisionTower(Tower):
    """A vision backbone and a head on its class, register and patch tokens.

    Args:
        backbone: a `Backbone` with the attribute `num_heads`.
        freeze_backbone: no gradients for the backbone, which stays in evaluation mode.
        embed_dim: width of the image features.
        num_head_blocks, blocks_drop_path, use_class_token, use_patch_tokens, use_linear_projection: see `VisionHead`.
        patch_token_layer: the layer whose patches and registers are used, counted from the end (1: the last).
        patch_tokens_pooler_type: how patches become one vector: `"mean"` or `"max"`.

    Raises:
        ValueError: unknown pooler, or see `VisionHead`.
    """

    head: VisionHead

    def __init__(
        self,
        backbone: nn.Module,
        freeze_backbone: bool,
        embed_dim: int,
        num_head_blocks: int,
        blocks_drop_path: float,
        use_class_token: bool,
        use_patch_tokens: bool,
        patch_token_layer: int,
        patch_tokens_pooler_type: str,
        use_linear_projection: bool,
    ) -> None:
        super().__init__()
        if patch_tokens_pooler_type not in get_args(Pooler):
            raise ValueError(
                f"unknown patch_tokens_pooler_type {patch_tokens_pooler_type!r}; "
                f"expected one of {', '.join(get_args(Pooler))}"
            )
        if patch_token_layer < 1:
            raise ValueError(f"patch_token_layer counts layers from the end, beginning with 1, got {patch_token_layer}")
        self.use_class_token = use_class_token
        self.use_patch_tokens = use_patch_tokens
        self.patch_token_layer = patch_token_layer
        self.patch_tokens_pooler_type = patch_tokens_pooler_type
        self.freeze_backbone = freeze_backbone
        self.num_register_tokens = int(
            getattr(backbone, "num_register_tokens", 0) or getattr(backbone, "n_storage_tokens", 0)
        )
        self.backbone = backbone
        self.head = VisionHead(
            int(backbone.embed_dim),  # type: ignore[arg-type]
            embed_dim,
            int(backbone.num_heads),  # type: ignore[arg-type]
            num_head_blocks,
            blocks_drop_path,
            use_class_token,
            use_patch_tokens,
            use_linear_projection,
        )
        self.freeze()

    def get_backbone_features(self, images: Tensor) -> BackboneFeatures:
        """Tokens of images `[B, 3, H, W]`, all after the backbone's final norm."""
        layers: Any = cast(Backbone, self.backbone).get_intermediate_layers(
            images, n=self.patch_token_layer, return_class_token=True, return_extra_tokens=True
        )
        patches, _, registers = layers[0]
        return BackboneFeatures(layers[-1][1], patches, registers)

    def get_class_and_patch_tokens(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Class token `[B, D']` and patch tokens `[B, P, D']` after the head, and the backbone's patch tokens."""
        class_token, patches, registers = self.get_backbone_features(images)
        tokens = self.head(torch.cat([class_token[:, None], registers, patches], dim=1))
        return tokens[:, 0], tokens[:, 1 + registers.shape[1] :], patches

    def forward(self, images: Tensor) -> VisionFeatures:
        """Features of images `[B, 3, H, W]`: of the class token, then of the pooled patches, as far as enabled."""
        class_token, patch_tokens, backbone_patch_tokens = self.get_class_and_patch_tokens(images)
        parts = [class_token] if self.use_class_token else []
        if self.use_patch_tokens:
            parts.append(
                patch_tokens.mean(1) if self.patch_tokens_pooler_type == "mean" else patch_tokens.max(1).values
            )
        return VisionFeatures(torch.cat(parts, dim=-1), patch_tokens, backbone_patch_tokens)

    def graph_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """What an exported graph gives: `image_features` `[B, embed_dim]`, and `patch_tokens` `[B, P, D']`."""
        found: VisionFeatures = self(images)
        return {"image_features": found.features, "patch_tokens": found.patch_tokens}


def build_vision_model(
    *,
    embed_dim: int,
    backbone: nn.Module,
    freeze_backbone: bool = True,
    num_head_blocks: int = 0,
    blocks_drop_path: float = 0.3,
    use_class_token: bool = True,
    use_patch_tokens: bool = False,
    patch_token_layer: int = 1,
    patch_tokens_pooler_type: str = "mean",
    use_linear_projection: bool = False,
) -> VisionTower:
    """A vision tower around a backbone; arguments and errors as in `VisionTower`."""
    return VisionTower(
        backbone,
        freeze_backbone,
        embed_dim,
        num_head_blocks,
        blocks_drop_path,
        use_class_token,
        use_patch_tokens,
        patch_token_layer,
        patch_tokens_pooler_type,
        use_linear_projection,
    )
