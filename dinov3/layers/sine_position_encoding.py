"""Sine encodings of positions on a plane, as transformers over feature maps use them.

Source: Carion et al., End-to-End Object Detection with Transformers (2020), appendix A.4.
"""

import math

import torch
from torch import Tensor, nn


def sine_encoding(values: Tensor, n_features: int, temperature: float = 10_000.0) -> Tensor:
    """Sines (even channels) and cosines (odd ones) of values over temperature^(2 floor(k / 2) / n_features).

    Args:
        values: angles `[...]`.
        n_features: N.
        temperature: the longest wavelength over 2 pi, about.

    Returns:
        float32 `[..., N]`.
    """
    channel = torch.arange(n_features, device=values.device)
    wavelength = temperature ** (2 * (channel // 2) / n_features)
    angles = values.float()[..., None] / wavelength
    return torch.where(channel % 2 == 0, angles.sin(), angles.cos())


class PositionEmbeddingSine(nn.Module):
    """Encodings of row (first half of the channels) and column, counted from 1 over the cells that are no padding.

    Args:
        num_pos_feats: channels of each half.
        temperature: see `sine_encoding`.
        normalize: rows and columns run up to `scale` whatever the size of the map.
        scale: None: 2 pi.

    Raises:
        ValueError: a scale without `normalize`.
    """

    def __init__(
        self,
        num_pos_feats: int = 64,
        temperature: float = 10_000.0,
        normalize: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if scale is not None and not normalize:
            raise ValueError(f"scale={scale} has no effect without normalize=True")
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature
        self.normalize = normalize
        self.scale = 2 * math.pi if scale is None else scale

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """float32 `[B, 2 * num_pos_feats, h, w]`.

        Args:
            x: maps `[B, C, h, w]`; only their size counts.
            mask: `[B, h, w]`, True at padding.
        """
        if mask is None:
            mask = torch.zeros((x.shape[0], *x.shape[-2:]), dtype=torch.bool, device=x.device)
        valid = ~mask
        y, x = valid.cumsum(1, dtype=torch.float32), valid.cumsum(2, dtype=torch.float32)
        if self.normalize:
            y, x = y / (y[:, -1:] + 1e-6) * self.scale, x / (x[:, :, -1:] + 1e-6) * self.scale
        halves = [sine_encoding(v, self.num_pos_feats, self.temperature) for v in (y, x)]
        return torch.cat(halves, dim=-1).permute(0, 3, 1, 2)
