"""ViT-Adapter: features at four scales from a frozen vision transformer of one scale.

A small convolutional network gives details at strides 8, 16 and 32; interactions let its cells read the tokens of four
of the transformer's layers. The tokens themselves are never changed, so one forward of the backbone is enough.

Source: Chen et al., Vision Transformer Adapter for Dense Predictions (2023), section 3; of it the extractors only, as
in DINOv3 (2025), section 6.3.2.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov3.eval.segmentation.models.utils.ms_deform_attn import MSDeformAttn
from dinov3.eval.segmentation.models.utils.reference_points import cell_centres
from dinov3.layers.drop_path import DropPath
from dinov3.layers.sync_batch_norm import SyncBatchNorm
from dinov3.models.backbone import Backbone
from dinov3.models.features import frozen_features

Size = tuple[int, int]

_LayerNorm = partial(nn.LayerNorm, eps=1e-6)

# Of the coarsest of the four maps.
STRIDE = 32


class DINOv3_Adapter(nn.Module):  # noqa: N801 (published name)
    """Maps "1" to "4" at strides 4, 8, 16 and 32 from a frozen backbone.

    Args:
        backbone: a `Backbone` with one grid of tokens of one width D; frozen, and always in evaluation mode.
        interaction_indexes: layers that are read, one interaction each.
        pretrain_size: without effect.
        conv_inplane: channels of the first convolutions.
        n_points: points of each attention head.
        deform_num_heads: heads of the attention.
        drop_path_rate: of the feed-forward branches.
        init_values: without effect.
        with_cffn: add a feed-forward network to each extractor.
        cffn_ratio: its hidden width over D.
        deform_ratio: width of the attention's values over D.
        add_vit_feature: add the tokens, resized, to the maps; needs four layers.
        use_extra_extractor: let the last layer be read three times.
        with_cp: compute the extractors again in the backward pass, to save memory.
        use_backbone_norm: apply the backbone's final norm to every layer.

    Raises:
        ValueError: a backbone whose layers differ in width or size, or another number of layers than four.
    """

    image_multiple = STRIDE
    """What height and width of images must be multiples of."""

    def __init__(
        self,
        backbone: nn.Module,
        interaction_indexes: Sequence[int] = (9, 19, 29, 39),
        pretrain_size: int = 512,
        conv_inplane: int = 64,
        n_points: int = 4,
        deform_num_heads: int = 16,
        drop_path_rate: float = 0.3,
        init_values: float = 0.0,
        with_cffn: bool = True,
        cffn_ratio: float = 0.25,
        deform_ratio: float = 0.5,
        add_vit_feature: bool = True,
        use_extra_extractor: bool = True,
        with_cp: bool = True,
        *,
        use_backbone_norm: bool = True,
    ) -> None:
        super().__init__()
        if add_vit_feature and len(interaction_indexes) != 4:
            raise ValueError(f"add_vit_feature needs four interaction_indexes, got {list(interaction_indexes)}")
        protocol = cast(Backbone, backbone)
        if protocol.patch_size is None:
            raise ValueError(
                f"the adapter needs a backbone with patches of one size, such as a ViT; got {type(backbone).__name__}"
            )
        dim = protocol.embed_dim
        self.backbone = backbone.requires_grad_(False)
        self.interaction_indexes = list(interaction_indexes)
        self.add_vit_feature = add_vit_feature
        self.use_backbone_norm = use_backbone_norm
        self.level_embed = nn.Parameter(torch.empty(3, dim))
        self.spm = SpatialPriorModule(inplanes=conv_inplane, embed_dim=dim)
        last = len(self.interaction_indexes) - 1
        self.interactions = nn.ModuleList(
            InteractionBlockWithCls(
                dim,
                num_heads=deform_num_heads,
                n_points=n_points,
                drop_path=drop_path_rate,
                with_cffn=with_cffn,
                cffn_ratio=cffn_ratio,
                deform_ratio=deform_ratio,
                extra_extractor=use_extra_extractor and i == last,
                with_cp=with_cp,
            )
            for i in range(last + 1)
        )
        self.up = nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (SyncBatchNorm(dim) for _ in range(4))
        for module in (self.spm, self.interactions, self.up):
            module.apply(_init_weights)
        nn.init.normal_(self.level_embed)

    def train(self, mode: bool = True) -> "DINOv3_Adapter":
        """The backbone stays in evaluation mode whatever is asked for."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps `[B, D, H/s, W/s]` of images `[B, 3, H, W]`: "1" to "4" for s = 4, 8, 16 and 32.

        The backbone runs in bfloat16 on accelerators, as for the published head.

        Raises:
            ValueError: height or width is no multiple of 32.
        """
        height, width = x.shape[-2:]
        if height % STRIDE or width % STRIDE or not height or not width:
            raise ValueError(f"height and width of images must be multiples of {STRIDE}, got {height} x {width}")
        sizes = [(height // stride, width // stride) for stride in (8, 16, 32)]
        c1, *levels = self.spm(x)
        c = torch.cat([level + embed for level, embed in zip(levels, self.level_embed, strict=True)], dim=1)

        maps = self._token_maps(x, c.dtype)
        references = cell_centres(sizes, x.device)
        for interaction, tokens in zip(self.interactions, maps, strict=True):
            c = interaction(c, references, tokens, sizes)

        parts = c.transpose(1, 2).split([h * w for h, w in sizes], dim=2)
        c2, c3, c4 = (part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True))
        outputs = [self.up(c2) + c1, c2, c3, c4]
        if self.add_vit_feature:
            outputs = [
                out + F.interpolate(tokens, size=out.shape[-2:], mode="bilinear", align_corners=False)
                for out, tokens in zip(outputs, maps, strict=True)
            ]
        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        return {str(i): norm(out) for i, (norm, out) in enumerate(zip(norms, outputs, strict=True), start=1)}

    def _token_maps(self, images: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Tokens `[B, D, h, w]` of the layers."""
        features = frozen_features(
            self.backbone,
            images,
            self.interaction_indexes,
            norm=self.use_backbone_norm,
            autocast_dtype=torch.bfloat16,
            fit="resize",
        )
        return [layer.map.to(dtype) for layer in features.layers]


class SpatialPriorModule(nn.Module):
    """Convolutions that look at the image alone.

    Args:
        inplanes: channels c of the first convolutions; later ones have 2 c and 4 c.
        embed_dim: D.
    """

    def __init__(self, inplanes: int = 64, embed_dim: int = 384) -> None:
        super().__init__()
        c = inplanes
        self.stem = nn.Sequential(
            *_conv_norm_relu(3, c, stride=2),
            *_conv_norm_relu(c, c, stride=1),
            *_conv_norm_relu(c, c, stride=1),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*_conv_norm_relu(c, 2 * c, stride=2))
        self.conv3 = nn.Sequential(*_conv_norm_relu(2 * c, 4 * c, stride=2))
        self.conv4 = nn.Sequential(*_conv_norm_relu(4 * c, 4 * c, stride=2))
        self.fc1, self.fc2, self.fc3, self.fc4 = (
            nn.Conv2d(width, embed_dim, kernel_size=1) for width in (c, 2 * c, 4 * c, 4 * c)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A map `[B, D, H/4, W/4]`, and cells `[B, n, D]` at strides 8, 16 and 32, of images `[B, 3, H, W]`."""
        x1 = self.stem(x)
        x2 = self.conv2(x1)
        x3 = self.conv3(x2)
        x4 = self.conv4(x3)
        c2, c3, c4 = (
            fc(level).flatten(2).transpose(1, 2) for fc, level in ((self.fc2, x2), (self.fc3, x3), (self.fc4, x4))
        )
        return self.fc1(x1), c2, c3, c4


def _conv_norm_relu(n_in: int, n_out: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(n_in, n_out, kernel_size=3, stride=stride, padding=1, bias=False)
    return [conv, SyncBatchNorm(n_out), nn.ReLU(inplace=True)]


class InteractionBlockWithCls(nn.Module):
    """Lets the cells read the tokens of one layer: one extractor, or three with `extra_extractor`. See `Extractor`."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 16,
        n_points: int = 4,
        drop_path: float = 0.0,
        with_cffn: bool = True,
        cffn_ratio: float = 0.25,
        deform_ratio: float = 1.0,
        extra_extractor: bool = False,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        make = partial(
            Extractor,
            dim,
            num_heads=num_heads,
            n_points=n_points,
            deform_ratio=deform_ratio,
            with_cffn=with_cffn,
            cffn_ratio=cffn_ratio,
            drop_path=drop_path,
            with_cp=with_cp,
        )
        self.extractor = make()
        self.extra_extractors = nn.ModuleList(make() for _ in range(2)) if extra_extractor else None

    def forward(self, c: Tensor, references: Tensor, tokens: Tensor, sizes: Sequence[Size]) -> Tensor:
        """See `Extractor.forward`; `tokens` is a map `[B, D, h, w]`."""
        feat, feat_size = tokens.flatten(2).transpose(1, 2), (tokens.shape[-2], tokens.shape[-1])
        for extractor in (self.extractor, *(self.extra_extractors or ())):
            c = extractor(c, references, feat, feat_size, sizes)
        return c


class Extractor(nn.Module):
    """Deformable attention from cells to tokens, then a feed-forward network, each around a residual connection.

    Args:
        dim: D of cells and tokens.
        num_heads, n_points, deform_ratio: of the attention, see `MSDeformAttn`.
        with_cffn, cffn_ratio: whether there is a feed-forward network, and its hidden width over D.
        drop_path: probability that a sample skips it.
        with_cp: compute everything again in the backward pass.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 6,
        n_points: int = 4,
        deform_ratio: float = 1.0,
        with_cffn: bool = True,
        cffn_ratio: float = 0.25,
        drop_path: float = 0.0,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.query_norm = _LayerNorm(dim)
        self.feat_norm = _LayerNorm(dim)
        self.attn = MSDeformAttn(dim, n_levels=1, n_heads=num_heads, n_points=n_points, ratio=deform_ratio)
        self.with_cffn = with_cffn
        self.with_cp = with_cp
        if with_cffn:
            self.ffn = ConvFFN(dim, int(dim * cffn_ratio))
            self.ffn_norm = _LayerNorm(dim)
            self.drop_path = DropPath(drop_path)

    def forward(
        self, query: Tensor, references: Tensor, feat: Tensor, feat_size: Size, query_sizes: Sequence[Size]
    ) -> Tensor:
        """Updated cells `[B, Lq, D]`.

        Args:
            query: cells `[B, Lq, D]` of three grids, one after the other.
            references: their places, `[1, Lq, 1, 2]`.
            feat: tokens `[B, h * w, D]`.
            feat_size: (h, w).
            query_sizes: (H, W) of the three grids.
        """
        if self.with_cp and torch.is_grad_enabled() and query.requires_grad:
            arguments = (query, references, feat, feat_size, query_sizes)
            updated: Tensor = checkpoint(self._update, *arguments, use_reentrant=False)
            return updated
        return self._update(query, references, feat, feat_size, query_sizes)

    def _update(
        self, query: Tensor, references: Tensor, feat: Tensor, feat_size: Size, query_sizes: Sequence[Size]
    ) -> Tensor:
        query = query + self.attn(self.query_norm(query), references, self.feat_norm(feat), [feat_size])
        if self.with_cffn:
            query = query + self.drop_path(self.ffn(self.ffn_norm(query), query_sizes))
        return query


class ConvFFN(nn.Module):
    """Two linear layers with a depth-wise 3 x 3 convolution between them, on every grid of cells by itself."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = DWConv(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, sizes: Sequence[Size]) -> Tensor:
        """`[B, S, D]` to the same; `sizes`: (H, W) of the grids."""
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), sizes)))


class DWConv(nn.Module):
    """The convolution of `ConvFFN`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, x: Tensor, sizes: Sequence[Size]) -> Tensor:
        """`[B, S, C]` to the same."""
        parts = x.transpose(1, 2).split([height * width for height, width in sizes], dim=2)
        maps = (self.dwconv(part.unflatten(2, size)) for part, size in zip(parts, sizes, strict=True))
        return torch.cat([one.flatten(2) for one in maps], dim=2).transpose(1, 2)


def _init_weights(module: nn.Module) -> None:
    """Initial values of the layers outside the deformable attention, which has its own."""
    if isinstance(module, MSDeformAttn):
        module.reset_parameters()  # its layers were visited before it
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        kernel_h, kernel_w = module.kernel_size
        fan_out = kernel_h * kernel_w * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
