"""Encodings of where a cell lies in its image, and of boxes.

Source: Carion et al., End-to-End Object Detection with Transformers (2020), appendix A.4.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.eval.detection.config import DetectionHeadConfig, PositionEncoding
from dinov3.eval.detection.util.misc import NestedTensor
from dinov3.layers.sine_position_encoding import sine_encoding

_TABLE_LENGTH = 50


class PositionEmbeddingSine(nn.Module):
    """Sine encoding of rows (first half of the channels) and columns, counted over the cells that are not padding.

    Args:
        num_pos_feats: channels of each half.
        normalize: rows and columns run from 0 to 2 pi whatever the size of the image.
    """

    def __init__(self, num_pos_feats: int = 64, normalize: bool = False) -> None:
        super().__init__()
        self.num_pos_feats, self.normalize = num_pos_feats, normalize

    def forward(self, batch: NestedTensor) -> Tensor:
        """Encoding `[B, 2 * num_pos_feats, h, w]` of maps `[B, C, h, w]`, in their dtype."""
        valid = ~batch.mask
        y, x = valid.cumsum(1, dtype=torch.float32), valid.cumsum(2, dtype=torch.float32)
        rows, columns = y[:, -1:], x[:, :, -1:]
        y, x = y - 0.5, x - 0.5
        if self.normalize:
            y, x = y / (rows + 1e-6), x / (columns + 1e-6)
        encoded = [sine_encoding(v * (2 * math.pi), self.num_pos_feats) for v in (y, x)]
        return torch.cat(encoded, dim=-1).permute(0, 3, 1, 2).to(batch.tensors.dtype)


class PositionEmbeddingLearned(nn.Module):
    """A learned vector for each column (first half of the channels) and each row.

    Grids of more than 50 cells a side take the tables interpolated linearly.
    """

    def __init__(self, num_pos_feats: int = 256) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(_TABLE_LENGTH, num_pos_feats)
        self.col_embed = nn.Embedding(_TABLE_LENGTH, num_pos_feats)
        for table in (self.row_embed, self.col_embed):
            nn.init.uniform_(table.weight)

    def forward(self, batch: NestedTensor) -> Tensor:
        """Encoding `[B, 2 * num_pos_feats, h, w]` of maps `[B, C, h, w]`, in their dtype."""
        height, width = batch.mask.shape[-2:]
        rows, columns = _rows(self.row_embed.weight, height), _rows(self.col_embed.weight, width)
        grid = torch.cat([columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)], dim=-1)
        return grid.permute(2, 0, 1).expand(batch.mask.shape[0], -1, -1, -1).to(batch.tensors.dtype)


def _rows(table: Tensor, n: int) -> Tensor:
    if n <= len(table):
        return table[:n]
    return F.interpolate(table.T[None], size=n, mode="linear", align_corners=True)[0].T


def build_position_encoding(config: DetectionHeadConfig) -> nn.Module:
    """The encoding that the configuration names, `hidden_dim` wide."""
    n_features = config.hidden_dim // 2
    if config.position_embedding is PositionEncoding.LEARNED:
        return PositionEmbeddingLearned(n_features)
    return PositionEmbeddingSine(n_features, normalize=config.position_embedding is PositionEncoding.SINE)
