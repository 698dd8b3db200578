"""The vision transformer, its named sizes, and their registry."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.layers import (
    LayerScale,
    LinearKMaskedBias,
    Mlp,
    PatchEmbed,
    RMSNorm,
    RopePositionEmbedding,
    SelfAttentionBlock,
    SwiGLUFFN,
)
from dinov3.layers.rope_position_encoding import RopeTables
from dinov3.models.backbone import resolve_layer_indices
from dinov3.utils.dtype import dtype_dict
from dinov3.utils.modules import named_apply

logger = logging.getLogger("dinov3")

Features = dict[str, Tensor | None]

ffn_layer_dict: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "swiglu": SwiGLUFFN,
    "swiglu32": partial(SwiGLUFFN, align_to=32),
    "swiglu64": partial(SwiGLUFFN, align_to=64),
    "swiglu128": partial(SwiGLUFFN, align_to=128),
}

norm_layer_dict: dict[str, Callable[..., nn.Module]] = {
    "layernorm": partial(nn.LayerNorm, eps=1e-6),
    "layernormbf16": partial(nn.LayerNorm, eps=1e-5),  # for models that run in bfloat16; only the eps differs
    "rmsnorm": RMSNorm,
}


def init_weights_vit(module: nn.Module, name: str = "") -> None:
    """Initialise one module: linear weights truncated normal (std 0.02), biases 0; norms, scales, patches reset."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, LinearKMaskedBias):
            module.reset_mask()
    elif isinstance(module, nn.LayerNorm | RMSNorm | LayerScale | PatchEmbed):
        module.reset_parameters()


class DinoVisionTransformer(nn.Module):
    """A vision transformer with rotary positions, a class token and storage (register) tokens.

    Tokens are always ordered [class, R storage, P patches], patches row by row; N = 1 + R + P.

    Source: Simeoni et al., DINOv3 (2025), section 3; Darcet et al., Vision Transformers Need Registers (2023).
    """

    chunked_blocks = False
    selects_patches = True  # `forward_features` takes `patch_indices`

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        pos_embed_rope_base: float | None = 100.0,
        pos_embed_rope_min_period: float | None = None,
        pos_embed_rope_max_period: float | None = None,
        pos_embed_rope_normalize_coords: str = "separate",
        pos_embed_rope_shift_coords: float | None = None,
        pos_embed_rope_jitter_coords: float | None = None,
        pos_embed_rope_rescale_coords: float | None = None,
        pos_embed_rope_dtype: str = "bf16",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        ffn_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        layerscale_init: float | None = None,
        norm_layer: str = "layernorm",
        ffn_layer: str = "mlp",
        ffn_bias: bool = True,
        proj_bias: bool = True,
        n_storage_tokens: int = 0,
        mask_k_bias: bool = False,
        untie_cls_and_patch_norms: bool = False,
        untie_global_and_local_cls_norm: bool = False,
        device: torch.device | str | None = None,
        **ignored_kwargs: Any,
    ) -> None:
        """Build the network; call `init_weights()` before training it from scratch.

        Args:
            img_size: informative only, any size of at least one patch is accepted.
            patch_size: side of a patch [pixels].
            in_chans: channels of the images.
            pos_embed_rope_*: see `RopePositionEmbedding`; dtype is "fp32", "fp16" or "bf16".
            embed_dim: width D of the tokens.
            depth: number of blocks.
            num_heads: attention heads.
            ffn_ratio: hidden width of the feed-forward network over D.
            qkv_bias: bias on queries, keys and values.
            drop_path_rate: part of the batch that each branch skips in training, the same in all blocks.
            layerscale_init: initial layer scale; None or 0 leaves it out.
            norm_layer: a name in `norm_layer_dict`.
            ffn_layer: a name in `ffn_layer_dict`.
            ffn_bias: bias in the feed-forward network.
            proj_bias: bias of the attention's output.
            n_storage_tokens: number R of storage tokens.
            mask_k_bias: no bias on the keys.
            untie_cls_and_patch_norms: a final norm of their own for class and storage tokens.
            untie_global_and_local_cls_norm: another one for local crops, in training only.
            device: of all parameters and buffers.
            ignored_kwargs: unknown options; they are logged and have no effect.
        """
        super().__init__()
        if ignored_kwargs:
            logger.warning(f"DinoVisionTransformer: ignored unknown options {ignored_kwargs}")
        make_norm = _lookup("norm_layer", norm_layer, norm_layer_dict)
        make_ffn = _lookup("ffn_layer", ffn_layer, ffn_layer_dict)
        self.embed_dim = self.num_features = embed_dim
        self.n_blocks = depth
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.n_storage_tokens = n_storage_tokens
        self.untie_cls_and_patch_norms = untie_cls_and_patch_norms
        self.untie_global_and_local_cls_norm = untie_global_and_local_cls_norm

        # The order of registration is the order of released state dicts.
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, device=device)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, device=device))
        if n_storage_tokens > 0:
            self.storage_tokens = nn.Parameter(torch.zeros(1, n_storage_tokens, embed_dim, device=device))
        self.rope_embed = RopePositionEmbedding(
            embed_dim,
            num_heads=num_heads,
            base=pos_embed_rope_base,
            min_period=pos_embed_rope_min_period,
            max_period=pos_embed_rope_max_period,
            normalize_coords=pos_embed_rope_normalize_coords,
            shift_coords=pos_embed_rope_shift_coords,
            jitter_coords=pos_embed_rope_jitter_coords,
            rescale_coords=pos_embed_rope_rescale_coords,
            dtype=_lookup("pos_embed_rope_dtype", pos_embed_rope_dtype, dtype_dict),
            device=device,
        )
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(
                dim=embed_dim,
                num_heads=num_heads,
                ffn_ratio=ffn_ratio,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                ffn_bias=ffn_bias,
                drop_path=drop_path_rate,
                norm_layer=make_norm,
                act_layer=nn.GELU,
                ffn_layer=make_ffn,
                init_values=layerscale_init,
                mask_k_bias=mask_k_bias,
                device=device,
            )
            for _ in range(depth)
        )
        self.norm = make_norm(embed_dim, device=device)
        self.cls_norm = make_norm(embed_dim, device=device) if untie_cls_and_patch_norms else None
        self.local_cls_norm = make_norm(embed_dim, device=device) if untie_global_and_local_cls_norm else None
        self.head = nn.Identity()
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim, device=device))

    @property
    def embed_dims(self) -> list[int]:
        """Width of the output of each block."""
        return [self.embed_dim] * self.n_blocks

    @property
    def stride(self) -> int:
        """What sides of images should be multiples of."""
        return self.patch_size

    def wrap_units(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.blocks)

    def checkpoint_units(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.blocks)

    def init_weights(self) -> None:
        """Initialise every parameter and buffer, also after `to_empty()`: nothing of the old content is used."""
        self.rope_embed.reset_parameters()
        nn.init.normal_(self.cls_token, std=0.02)
        if self.n_storage_tokens > 0:
            nn.init.normal_(self.storage_tokens, std=0.02)
        nn.init.zeros_(self.mask_token)
        named_apply(init_weights_vit, self)

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
        is_training: bool = False,
        patch_indices: Sequence[Tensor | None] | None = None,
    ) -> Any:
        """Normed class tokens `[B, D]` of images `[B, C, H, W]`, or a list of them for a list.

        With `is_training` returns what `forward_features` returns.
        """
        features = self.forward_features(x, masks, patch_indices)
        if is_training:
            return features
        if isinstance(features, list):
            return [self.head(entry["x_norm_clstoken"]) for entry in features]
        return self.head(features["x_norm_clstoken"])

    def forward_features(
        self,
        x: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
        patch_indices: Sequence[Tensor | None] | None = None,
    ) -> Features | list[Features]:
        """All tokens after the last block, normed.

        Args:
            x: images `[B, C, H, W]`, or a list of batches of several sizes, global crops first, local crops second.
            masks: booleans `[B, P]`, true where the mask token stands in for the patch; a list (or None) for a list.
            patch_indices: with a list only: for each entry None, or the patches that are wanted, as numbers `[M]` out
                of B * P. Of such an entry the last block computes only these and the class tokens, and its dict has
                `x_norm_clstoken` `[B, D]`, `x_norm_patchtokens` `[M, D]` (in that order) and `masks` alone.

        Returns:
            A dict: `x_norm_clstoken` `[B, D]`, `x_storage_tokens` `[B, R, D]` (normed), `x_norm_patchtokens`
            `[B, P, D]`, `x_prenorm` `[B, N, D]` (output of the last block), `masks` (as given). For a list one each.
        """
        if isinstance(x, Tensor):
            return self._forward_list([x], [masks])[0]  # type: ignore[list-item]
        return self._forward_list(list(x), [None] * len(x) if masks is None else list(masks), patch_indices)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        *,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """Outputs of some blocks, in block order; blocks after the last one asked for are not run.

        Args:
            x: images `[B, C, H, W]`.
            n: the number of last blocks, or distinct block indices (negative ones count from the end).
            reshape: patches as maps `[B, D, h, w]` instead of `[B, P, D]`.
            return_class_token: add the class tokens `[B, D]`.
            return_extra_tokens: add the storage tokens `[B, R, D]`.
            norm: apply the final norm to each.

        Returns:
            Per block the patches, or a tuple (patches[, class][, storage]).

        Raises:
            ValueError: blocks that do not exist or are repeated, or images smaller than a patch.
        """
        indices = resolve_layer_indices(n, self.n_blocks)
        rows, columns = self.patch_embed.grid_size(*x.shape[-2:])
        outputs = []
        tokens = [self._embed(x, None)]
        tables = _Tables(self.rope_embed, [(rows, columns)], self._n_prefix)
        for index, block in enumerate(self.blocks[: indices[-1] + 1]):
            tokens = block(tokens, tables.for_block())
            if index in indices:
                prefix, patches = self._norm(tokens[0]) if norm else self._split(tokens[0])
                if reshape:
                    patches = patches.transpose(1, 2).reshape(x.shape[0], -1, rows, columns).contiguous()
                parts = [patches]
                parts += [prefix[:, 0]] if return_class_token else []
                parts += [prefix[:, 1:]] if return_extra_tokens else []
                outputs.append(parts[0] if len(parts) == 1 else tuple(parts))
        return tuple(outputs)

    @property
    def _n_prefix(self) -> int:
        return 1 + self.n_storage_tokens

    def _forward_list(
        self,
        images: list[Tensor],
        masks: list[Tensor | None],
        patch_indices: Sequence[Tensor | None] | None = None,
    ) -> list[Features]:
        tokens = [self._embed(x, mask) for x, mask in zip(images, masks, strict=True)]
        grids = [self.patch_embed.grid_size(*x.shape[-2:]) for x in images]
        tables = _Tables(self.rope_embed, grids, self._n_prefix)
        *blocks, last = self.blocks
        for block in blocks:
            tokens = block(tokens, tables.for_block())
        rows_list: list[Tensor | None] = [None] * len(images)
        if patch_indices is None:
            tokens = last(tokens, tables.for_block())
        else:
            chosen = zip(tokens, patch_indices, strict=True)
            rows_list = [None if indices is None else self._rows(x, indices) for x, indices in chosen]
            tokens = last(tokens, tables.for_block(), rows_list)
        features: list[Features] = []
        for index, (x, mask, rows) in enumerate(zip(tokens, masks, rows_list, strict=True)):
            local_crops = self.training and index == 1
            if rows is not None:
                prefix, patches = self._norm(x.unsqueeze(0), local_crops=local_crops, n_prefix=len(images[index]))
                features.append({"x_norm_clstoken": prefix[0], "x_norm_patchtokens": patches[0], "masks": mask})
                continue
            prefix, patches = self._norm(x, local_crops=local_crops)
            features.append(
                {
                    "x_norm_clstoken": prefix[:, 0],
                    "x_storage_tokens": prefix[:, 1:],
                    "x_norm_patchtokens": patches,
                    "x_prenorm": x,
                    "masks": mask,
                }
            )
        return features

    def _rows(self, tokens: Tensor, patch_indices: Tensor) -> Tensor:
        """Numbers, out of B * N, of the class tokens and then of some patches, numbered out of B * P."""
        n_samples, n_tokens, _ = tokens.shape
        n_patches = n_tokens - self._n_prefix
        cls_rows = torch.arange(0, n_samples * n_tokens, n_tokens, device=tokens.device)
        patch_rows = patch_indices // n_patches * n_tokens + self._n_prefix + patch_indices % n_patches
        return torch.cat([cls_rows, patch_rows])

    def _embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Class, storage and patch tokens `[B, N, D]`."""
        patches = self.patch_embed(images)
        cls_token: Tensor = self.cls_token
        if mask is not None:
            if mask.shape != patches.shape[:2]:
                raise ValueError(f"expected masks of shape {tuple(patches.shape[:2])} [B, P], got {tuple(mask.shape)}")
            patches = torch.where(mask.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        else:
            # Sharded and distributed training want a gradient for every parameter in every step, if only zero.
            cls_token = cls_token + 0 * self.mask_token
        prefix = [cls_token, self.storage_tokens] if self.n_storage_tokens > 0 else [cls_token]
        # Under autocast patches are bfloat16; concatenation lifts the residual stream to the float32 of the tokens.
        return torch.cat([*(token.expand(images.shape[0], -1, -1) for token in prefix), patches], dim=1)

    def _norm(self, x: Tensor, local_crops: bool = False, n_prefix: int | None = None) -> tuple[Tensor, Tensor]:
        """Normed class and storage tokens (the first `n_prefix` tokens, by default a sample's), normed patches."""
        prefix_norm = self.local_cls_norm if local_crops and self.local_cls_norm is not None else self.cls_norm
        if prefix_norm is None:
            return self._split(self.norm(x), n_prefix)
        prefix, patches = self._split(x, n_prefix)
        return prefix_norm(prefix), self.norm(patches)

    def _split(self, x: Tensor, n_prefix: int | None = None) -> tuple[Tensor, Tensor]:
        n = self._n_prefix if n_prefix is None else n_prefix
        return x[:, :n], x[:, n:]


class _Tables:
    """Position tables of one forward pass: drawn anew for each block and entry if random, else shared by all blocks."""

    def __init__(self, rope: RopePositionEmbedding, grids: list[tuple[int, int]], n_prefix: int) -> None:
        self._rope, self._grids, self._n_prefix = rope, grids, n_prefix
        self._shared = None if rope.is_random else self._make()

    def for_block(self) -> list[RopeTables]:
        return self._make() if self._shared is None else self._shared

    def _make(self) -> list[RopeTables]:
        return [self._rope(H=rows, W=columns, n_prefix=self._n_prefix) for rows, columns in self._grids]


def _lookup(option: str, name: str, table: dict[str, Any]) -> Any:
    if name not in table:
        raise ValueError(f"{option} is one of {', '.join(table)}; got {name!r}")
    return table[name]


def vit_nano(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """128 wide, 4 blocks, 4 heads: trains in minutes on a CPU (quick start). No published counterpart."""
    return DinoVisionTransformer(**(_sizes(patch_size, 128, 4, 4) | kwargs))


def vit_small(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-S: 384 wide, 12 blocks, 6 heads."""
    return DinoVisionTransformer(**(_sizes(patch_size, 384, 12, 6) | kwargs))


def vit_base(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-B: 768 wide, 12 blocks, 12 heads."""
    return DinoVisionTransformer(**(_sizes(patch_size, 768, 12, 12) | kwargs))


def vit_large(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-L: 1024 wide, 24 blocks, 16 heads."""
    return DinoVisionTransformer(**(_sizes(patch_size, 1024, 24, 16) | kwargs))


def vit_so400m(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-So400m: 1152 wide, 27 blocks, 18 heads, feed-forward 4352."""
    return DinoVisionTransformer(**(_sizes(patch_size, 1152, 27, 18, ffn_ratio=3.777777778) | kwargs))


def vit_huge2(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-H: 1280 wide, 32 blocks, 20 heads."""
    return DinoVisionTransformer(**(_sizes(patch_size, 1280, 32, 20) | kwargs))


def vit_giant2(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-g: 1536 wide, 40 blocks, 24 heads."""
    return DinoVisionTransformer(**(_sizes(patch_size, 1536, 40, 24) | kwargs))


def vit_7b(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-7B: 4096 wide, 40 blocks, 32 heads, feed-forward ratio 3."""
    return DinoVisionTransformer(**(_sizes(patch_size, 4096, 40, 32, ffn_ratio=3) | kwargs))


def _sizes(patch_size: int, embed_dim: int, depth: int, num_heads: int, ffn_ratio: float = 4) -> dict[str, Any]:
    return {
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "ffn_ratio": ffn_ratio,
    }


VitConstructor = Callable[..., DinoVisionTransformer]

_NO_ARCHITECTURE = ("init_weights_vit", "register_vit", "get_vit_arch")


def register_vit(name: str, constructor: VitConstructor) -> None:
    """Make `constructor(patch_size=..., **options)` known as the architecture `name`, which must contain "vit".

    Setting a function of that name on this module does the same.
    """
    if "vit" not in name or name in _NO_ARCHITECTURE:
        raise ValueError(f"the name of a vision transformer contains 'vit' (helpers of this file apart), got {name!r}")
    globals()[name] = constructor


def get_vit_arch(name: str) -> VitConstructor:
    """The constructor of the architecture `name`.

    Raises:
        NotImplementedError: no such architecture.
    """
    known: dict[str, VitConstructor] = {
        key: value
        for key, value in globals().items()
        if "vit" in key and callable(value) and key not in _NO_ARCHITECTURE
    }
    if name not in known:
        raise NotImplementedError(f"no vision transformer {name!r}; there are {', '.join(sorted(known))}")
    return known[name]
