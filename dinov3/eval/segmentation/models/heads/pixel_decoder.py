"""Pixel decoder of Mask2Former: a deformable transformer over three scales, and one step of a feature pyramid.

Always in float32, as for the published head.

Source: Cheng et al., Masked-attention Mask Transformer for Universal Image Segmentation (2022), section 4.1.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.eval.segmentation.models.utils.batch_norm import get_norm
from dinov3.eval.segmentation.models.utils.ms_deform_attn import MSDeformAttn
from dinov3.eval.segmentation.models.utils.reference_points import cell_centres
from dinov3.layers.linear import feed_forward
from dinov3.layers.sine_position_encoding import PositionEmbeddingSine
from dinov3.utils.dtype import autocast_to

InputShape = Mapping[str, Sequence[int]]
"""Name of a map -> [channels, h, w, stride]."""

Size = tuple[int, int]
Norm = str | Callable[[int], nn.Module]

_N_POINTS = 4


def names_by_stride(input_shape: InputShape) -> list[str]:
    """Names of the maps, finest first; those of one stride in the order given."""
    return sorted(input_shape, key=lambda name: input_shape[name][3])


class MSDeformAttnPixelDecoder(nn.Module):
    """Refined maps of three scales, and features that masks are made from.

    Args:
        input_shape: of the maps; the first by stride gets its details in the pyramid step, the others go through the
            transformer.
        transformer_dropout: of the encoder.
        transformer_nheads: attention heads.
        transformer_dim_feedforward: hidden width of the feed-forward networks.
        transformer_enc_layers: number of layers.
        conv_dim: width of the encoder.
        mask_dim: width of the mask features.
        norm: of the pyramid step, see `get_norm`.
        transformer_in_features: maps for the transformer; the finest one may be among them and is not used there.
        common_stride: of the mask features; without effect, the finest map decides.
    """

    def __init__(
        self,
        input_shape: InputShape,
        *,
        transformer_dropout: float,
        transformer_nheads: int,
        transformer_dim_feedforward: int,
        transformer_enc_layers: int,
        conv_dim: int,
        mask_dim: int,
        norm: Norm,
        transformer_in_features: Sequence[str],
        common_stride: int,
    ) -> None:
        super().__init__()
        names = names_by_stride(input_shape)
        self.finest = names[0]
        # From the coarsest to the finest, as the encoder and all after it count them.
        self.levels = [name for name in reversed(names[1:]) if name in transformer_in_features]
        if not self.levels:
            raise ValueError(f"no map for the transformer: got {list(transformer_in_features)} of {names}")
        self.input_convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(input_shape[name][0], conv_dim, kernel_size=1), nn.GroupNorm(32, conv_dim))
            for name in self.levels
        )
        self.encoder = MSDeformAttnTransformerEncoderOnly(
            conv_dim,
            transformer_nheads,
            transformer_enc_layers,
            transformer_dim_feedforward,
            transformer_dropout,
            n_levels=len(self.levels),
        )
        self.position = PositionEmbeddingSine(conv_dim // 2, normalize=True)
        self.mask_feature = nn.Conv2d(conv_dim, mask_dim, kernel_size=1)
        lateral = NormedConv2d(input_shape[self.finest][0], conv_dim, kernel_size=1, norm=norm)
        output = NormedConv2d(conv_dim, conv_dim, kernel_size=3, norm=norm)
        self.lateral_convs, self.output_convs = nn.ModuleList([lateral]), nn.ModuleList([output])
        for sequence in self.input_convs:
            nn.init.xavier_uniform_(sequence[0].weight)  # type: ignore[index]
            nn.init.zeros_(sequence[0].bias)  # type: ignore[index]
        for conv in (self.mask_feature, lateral, output):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward_features(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Mask features, the coarsest map, and all three maps from coarse to fine.

        Args:
            features: maps `[B, C, h, w]` by name.

        Returns:
            `[B, mask_dim, h1, w1]` at the size of the finest map, and maps `[B, conv_dim, h, w]`; float32.
        """
        with autocast_to(features[self.finest].device, torch.float32):
            inputs = [conv(features[name].float()) for conv, name in zip(self.input_convs, self.levels, strict=True)]
            maps = self.encoder(inputs, [self.position(x) for x in inputs])
            finest = self.lateral_convs[0](features[self.finest].float())
            upsampled = F.interpolate(maps[-1], size=finest.shape[-2:], mode="bilinear", align_corners=False)
            y = F.relu(self.output_convs[0](finest + upsampled))
            return self.mask_feature(y), maps[0], maps


class NormedConv2d(nn.Conv2d):
    """A convolution that keeps the size, followed by a norm; with a bias if there is none."""

    def __init__(self, n_in: int, n_out: int, *, kernel_size: int, norm: Norm) -> None:
        super().__init__(n_in, n_out, kernel_size, padding=kernel_size // 2, bias=norm == "")
        self.norm = get_norm(norm, n_out)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, n_in, h, w]` to `[B, n_out, h, w]`."""
        x = super().forward(x)
        return x if self.norm is None else self.norm(x)


class MSDeformAttnTransformerEncoderOnly(nn.Module):
    """Encoder over the cells of all levels together, each level marked by a learned vector."""

    def __init__(
        self, d_model: int, n_heads: int, n_layers: int, dim_feedforward: int, dropout: float, n_levels: int
    ) -> None:
        super().__init__()
        self.encoder = MSDeformAttnTransformerEncoder(
            MSDeformAttnTransformerEncoderLayer(d_model, dim_feedforward, dropout, n_levels, n_heads)
            for _ in range(n_layers)
        )
        self.level_encoding = nn.Parameter(torch.empty(n_levels, d_model))
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_encoding)

    def forward(self, maps: Sequence[Tensor], positions: Sequence[Tensor]) -> list[Tensor]:
        """Maps `[B, C, h, w]` of every level, refined; `positions`: their encodings, of the same shapes."""
        sizes = [(x.shape[-2], x.shape[-1]) for x in maps]
        cells = torch.cat([_cells(x) for x in maps], dim=1)
        marked = [_cells(x) + level for x, level in zip(positions, self.level_encoding, strict=True)]
        cells = self.encoder(cells, torch.cat(marked, dim=1), sizes)
        parts = cells.transpose(1, 2).split([height * width for height, width in sizes], dim=2)
        return [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]


def _cells(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


class MSDeformAttnTransformerEncoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, cells: Tensor, positions: Tensor, sizes: Sequence[Size]) -> Tensor:
        """`[B, S, C]` to the same; `sizes`: (H, W) of the levels."""
        references = cell_centres(sizes, cells.device)
        for layer in self.layers:
            cells = layer(cells, positions, references, sizes)
        return cells


class MSDeformAttnTransformerEncoderLayer(nn.Module):
    """Deformable self-attention, then a feed-forward network, each added to its input and normalised."""

    def __init__(self, d_model: int, dim_feedforward: int, dropout: float, n_levels: int, n_heads: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(d_model, n_levels, n_heads, _N_POINTS)
        self.norm1 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.activation = nn.ReLU(inplace=True)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, cells: Tensor, positions: Tensor, references: Tensor, sizes: Sequence[Size]) -> Tensor:
        """`[B, S, C]` to the same; `references`: places of the cells, `[1, S, 1, 2]`."""
        read = self.self_attn(cells + positions, references, cells, sizes)
        cells = self.norm1(cells + self.dropout(read))
        out = feed_forward(cells, self.linear1, self.activation, self.dropout, self.linear2)
        return self.norm2(cells + self.dropout(out))
