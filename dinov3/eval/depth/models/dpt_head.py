"""The DPT head: four levels of tokens, brought to four resolutions and fused from coarse to fine.

Ranftl et al., Vision Transformers for Dense Prediction, https://arxiv.org/abs/2103.13413, section 3. Names of
sub-modules are those of released files.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.eval.depth.models.linear_head import resize
from dinov3.layers.sync_batch_norm import SyncBatchNorm

ReadoutType = Literal["project", "add", "ignore"]
N_LEVELS = 4


class ConvModule(nn.Module):
    """A convolution, Kaiming-initialised for a ReLU behind it, which may be part of it."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, bias: bool, relu: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.relu = relu
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, h, w]` in the same size."""
        y: Tensor = self.conv(x)
        return y.relu() if self.relu else y


class ReassembleBlocks(nn.Module):
    """Tokens of four blocks as maps of four resolutions: 4, 2, 1 and 1/2 times that of the patches."""

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        readout_type: ReadoutType,
        use_batchnorm: bool,
    ) -> None:
        super().__init__()
        if readout_type not in ("project", "add", "ignore"):
            raise ValueError(f"readout_type is 'project', 'add' or 'ignore', got {readout_type!r}")
        self.readout_type = readout_type
        self.projects = nn.ModuleList(
            ConvModule(c, p, 1, bias=True) for c, p in zip(in_channels, out_channels, strict=True)
        )
        p0, p1, _, p3 = out_channels
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(p0, p0, kernel_size=4, stride=4),
                nn.ConvTranspose2d(p1, p1, kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(p3, p3, kernel_size=3, stride=2, padding=1),
            ]
        )
        if readout_type == "project":
            self.readout_projects = nn.ModuleList(nn.Sequential(nn.Linear(2 * c, c), nn.GELU()) for c in in_channels)
        self.batchnorm_layers = nn.ModuleList(SyncBatchNorm(c) if use_batchnorm else nn.Identity() for c in in_channels)

    def forward(self, inputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Maps `[B, P_i, h_i, w_i]` of (patch features `[B, C_i, h, w]`, class token `[B, C_i]`)."""
        outputs = []
        for i, (patches, class_token) in enumerate(inputs):
            x = self.batchnorm_layers[i](self._readout(i, patches, class_token))
            outputs.append(self.resize_layers[i](self.projects[i](x)))
        return outputs

    def _readout(self, i: int, patches: Tensor, class_token: Tensor) -> Tensor:
        """What the class token adds to each position."""
        if self.readout_type == "ignore":
            return patches
        if self.readout_type == "add":
            return patches + class_token[:, :, None, None]
        tokens = patches.flatten(2).transpose(1, 2)  # [B, h*w, C]
        both = torch.cat([tokens, class_token[:, None].expand_as(tokens)], dim=-1)
        return self.readout_projects[i](both).transpose(1, 2).unflatten(2, patches.shape[-2:])


class ResidualConvUnit(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = ConvModule(channels, channels, 3, bias=bias)
        self.conv2 = ConvModule(channels, channels, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, D, h, w]` in the same size."""
        residual: Tensor = self.conv2(self.conv1(x.relu()).relu())
        return residual + x


class FeatureFusionBlock(nn.Module):
    """Adds a finer level to what is fused so far, and doubles the resolution.

    The size is led by what is fused so far: a finer level that doesn't fit (odd patch grids) is resized to it.
    """

    def __init__(self, channels: int, bias: bool, has_skip: bool) -> None:
        super().__init__()
        self.project = ConvModule(channels, channels, 1, bias=True)
        if has_skip:
            self.res_conv_unit1 = ResidualConvUnit(channels, bias)
        self.res_conv_unit2 = ResidualConvUnit(channels, bias)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """`[B, D, 2h, 2w]` of x `[B, D, h, w]` and the finer level."""
        if skip is not None:
            x = x + self.res_conv_unit1(resize(skip, x.shape[-2:]))
        x = F.interpolate(self.res_conv_unit2(x), scale_factor=2, mode="bilinear", align_corners=True)
        projected: Tensor = self.project(x)
        return projected


class UpConvHead(nn.Module):
    """Convolutions that double the resolution once more and end in K channels."""

    def __init__(self, channels: int, n_output_channels: int, n_hidden_channels: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels // 2, kernel_size=3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(channels // 2, n_hidden_channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(n_hidden_channels, n_output_channels, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, K, 2h, 2w]`."""
        y: Tensor = self.head(x)
        return y


class DPTHead(nn.Module):
    """Four levels of tokens to K channels at about the resolution of the image.

    Patch grids (h, w) become 32 ceil(h / 2) x 32 ceil(w / 2) outputs: with patches of 16 pixels the size of the image
    if h and w are even, a little more if not.

    Args:
        in_channels: width C_i of each level.
        channels: width D of the fusion.
        post_process_channels: width P_i of each level after reassembly.
        readout_type: how the class token takes part: "project" (concatenated, linear layer), "add", "ignore".
        n_output_channels: K.
        n_hidden_channels: before the last convolution.
        use_batchnorm: normalise the levels over the batch, of all processes.
        use_bias: of the residual units.
        projection_after_fusion: one more convolution between fusion and head.

    Raises:
        ValueError: not four levels, or an unknown readout.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (1024,) * N_LEVELS,
        channels: int = 256,
        post_process_channels: Sequence[int] = (128, 256, 512, 1024),
        readout_type: ReadoutType = "project",
        n_output_channels: int = 256,
        n_hidden_channels: int = 32,
        use_batchnorm: bool = False,
        use_bias: bool = False,
        projection_after_fusion: bool = True,
    ) -> None:
        super().__init__()
        if len(in_channels) != N_LEVELS or len(post_process_channels) != N_LEVELS:
            raise ValueError(
                f"a DPT head takes {N_LEVELS} levels, got {len(in_channels)} widths of features and "
                f"{len(post_process_channels)} post_process_channels: set backbone_out_layers=FOUR_EVEN_INTERVALS, "
                "FOUR_LAST or four block indices"
            )
        self.reassemble_blocks = ReassembleBlocks(in_channels, post_process_channels, readout_type, use_batchnorm)
        self.convs = nn.ModuleList(ConvModule(p, channels, 3, bias=False) for p in post_process_channels)
        self.fusion_blocks = nn.ModuleList(
            FeatureFusionBlock(channels, use_bias, has_skip=j > 0) for j in range(N_LEVELS)
        )
        self.project = (
            ConvModule(channels, channels, 3, bias=True, relu=True) if projection_after_fusion else nn.Identity()
        )
        self.conv_depth = UpConvHead(channels, n_output_channels, n_hidden_channels)

    def forward_features(self, inputs: Sequence[Sequence[Tensor]]) -> Tensor:
        """The fused map `[B, D, 16 ceil(h / 2), 16 ceil(w / 2)]`; `inputs` as in `forward`."""
        if len(inputs) != N_LEVELS:
            raise ValueError(f"expected {N_LEVELS} levels of features, got {len(inputs)}")
        levels = [conv(level) for conv, level in zip(self.convs, self.reassemble_blocks(inputs), strict=True)]
        x = self.fusion_blocks[0](levels[-1])
        for fuse, level in zip(self.fusion_blocks[1:], reversed(levels[:-1]), strict=True):
            x = fuse(x, level)
        fused: Tensor = self.project(x)
        return fused

    def forward(self, inputs: Sequence[Sequence[Tensor]]) -> Tensor:
        """`[B, K, 32 ceil(h / 2), 32 ceil(w / 2)]`.

        Args:
            inputs: four pairs (patch features `[B, C_i, h, w]`, class token `[B, C_i]`), in block order.
        """
        logits: Tensor = self.conv_depth(self.forward_features(inputs))
        return logits

    def predict(self, x: Sequence[Sequence[Tensor]], rescale_to: Sequence[int] = (512, 512)) -> Tensor:
        """The output, resized (bilinear) to (H, W) pixels."""
        return resize(self(x), rescale_to)
