"""The linear head: one 1x1 convolution on the features of all levels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.layers.sync_batch_norm import SyncBatchNorm


class LinearHead(nn.Module):
    """Levels side by side, optionally normalised over the batch, then a 1x1 convolution.

    Args:
        in_channels: width of each level.
        n_output_channels: K.
        input_transform: with "resize" in it, levels are resized to the first one (bilinear); otherwise they must have
            one size.
        align_corners: of that resize, and of `predict`'s.
        use_batchnorm: normalise over the batch, of all processes.
        use_cls_token: put the class token behind the patch features at each position.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        n_output_channels: int,
        input_transform: str = "resize",
        align_corners: bool = False,
        use_batchnorm: bool = False,
        use_cls_token: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = list(in_channels)
        self.input_transform, self.align_corners, self.use_cls_token = input_transform, align_corners, use_cls_token
        channels = sum(self.in_channels) * (2 if use_cls_token else 1)
        self.batchnorm_layer = SyncBatchNorm(channels) if use_batchnorm else nn.Identity()
        self.conv_depth = nn.Conv2d(channels, n_output_channels, kernel_size=1)
        nn.init.normal_(self.conv_depth.weight, mean=0.0, std=0.01)
        nn.init.zeros_(self.conv_depth.bias)  # type: ignore[arg-type]

    def forward(self, inputs: Sequence[Tensor | Sequence[Tensor]]) -> Tensor:
        """`[B, K, h, w]`, in the size of the first level.

        Args:
            inputs: for each level patch features `[B, C, h, w]` (or vectors `[B, C]`) with the class token `[B, C]`;
                without `use_cls_token` the features alone will do.

        Raises:
            ValueError: another number of levels, or a class token that is missing.
        """
        if len(inputs) != len(self.in_channels):
            raise ValueError(f"expected {len(self.in_channels)} levels of features, got {len(inputs)}")
        levels = [self._level(level) for level in inputs]
        if "resize" in self.input_transform:
            size = levels[0].shape[-2:]
            levels = [resize(level, size, align_corners=self.align_corners) for level in levels]
        logits: Tensor = self.conv_depth(self.batchnorm_layer(torch.cat(levels, dim=1)))
        return logits

    def _level(self, level: Tensor | Sequence[Tensor]) -> Tensor:
        """Features of one level as a map, with the class token at each position if wanted."""
        patches = level if isinstance(level, Tensor) else level[0]
        if patches.ndim == 2:
            patches = patches[:, :, None, None]
        if not self.use_cls_token:
            return patches
        if isinstance(level, Tensor):
            raise ValueError("use_cls_token=True needs pairs (patch features, class token), got a tensor")
        return torch.cat([patches, level[1][:, :, None, None].expand_as(patches)], dim=1)

    def predict(self, x: Sequence[Tensor | Sequence[Tensor]], rescale_to: Sequence[int] = (512, 512)) -> Tensor:
        """The output, resized (bilinear) to (H, W) pixels."""
        return resize(self(x), rescale_to, align_corners=self.align_corners)


def resize(x: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Maps `[B, C, h, w]` in (H, W) pixels, bilinear; those that have this size are unchanged."""
    if not torch.compiler.is_exporting() and tuple(x.shape[-2:]) == tuple(size):  # the sizes of graphs are open
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)
