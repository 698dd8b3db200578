"""The linear head: a batch norm and one linear map at every position of a feature map."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.layers.sync_batch_norm import SyncBatchNorm

Feature = Tensor | tuple[Tensor, Tensor]
"""A map `[B, C, h, w]` or vector `[B, C]`; with class token: the pair of the map and the token `[B, C]`."""


class LinearHead(nn.Module):
    """Class logits from the features of one or several layers.

    Args:
        in_channels: width of each feature.
        n_output_channels: number of classes K.
        use_batchnorm: normalise channels first, over the batches of all processes.
        use_cls_token: features come with class tokens, which are added to every position as further channels.
        dropout: probability that a channel is dropped, in training.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        n_output_channels: int,
        use_batchnorm: bool = True,
        use_cls_token: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.in_channels = list(in_channels)
        self.n_output_channels = n_output_channels
        self.use_cls_token = use_cls_token
        self.channels = sum(self.in_channels) * (2 if use_cls_token else 1)
        self.batchnorm_layer = SyncBatchNorm(self.channels) if use_batchnorm else nn.Identity()
        self.conv = nn.Conv2d(self.channels, n_output_channels, kernel_size=1)
        self.dropout = nn.Dropout2d(dropout)
        nn.init.normal_(self.conv.weight, mean=0, std=0.01)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Feature]) -> Tensor:
        """Logits `[B, K, h, w]` at the size of the first feature.

        Raises:
            ValueError: not as many features, or not as wide, as the head was made for.
        """
        return self._classify(self.dropout(self._concatenate(features)))

    def predict(self, features: Sequence[Feature], rescale_to: Sequence[int] = (512, 512)) -> Tensor:
        """Logits `[B, K, *rescale_to]` without dropout, enlarged bilinearly."""
        logits = self._classify(self._concatenate(features))
        return F.interpolate(logits, size=tuple(rescale_to), mode="bilinear", align_corners=False)

    def _classify(self, x: Tensor) -> Tensor:
        return self.conv(self.batchnorm_layer(x))

    def _concatenate(self, features: Sequence[Feature]) -> Tensor:
        """`[B, C, h, w]`: all features at the size of the first."""
        if len(features) != len(self.in_channels):
            raise ValueError(f"expected {len(self.in_channels)} features, got {len(features)}")
        maps = [self._as_map(feature) for feature in features]
        size = maps[0].shape[-2:]
        maps = [
            x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
            for x in maps
        ]
        joined = torch.cat(maps, dim=1)
        if joined.shape[1] != self.channels:
            raise ValueError(f"features of {joined.shape[1]} channels for a head of {self.channels}")
        return joined

    def _as_map(self, feature: Feature) -> Tensor:
        token = None
        if self.use_cls_token:
            feature, token = feature
        assert isinstance(feature, Tensor)
        if feature.ndim == 2:
            feature = feature[:, :, None, None]
        if token is None:
            return feature
        return torch.cat([feature, token[:, :, None, None].expand(-1, -1, *feature.shape[-2:])], dim=1)
