"""A frozen backbone as the detector sees it: one feature map with its mask and position encoding.

The map joins several layers, on the whole image or on windows of it.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.eval.detection.config import DetectionHeadConfig
from dinov3.eval.detection.models.position_encoding import build_position_encoding
from dinov3.eval.detection.models.utils import LayerNorm2D
from dinov3.eval.detection.models.windows import WindowsWrapper
from dinov3.eval.detection.util.misc import NestedTensor, pad_to_multiple, resize_mask
from dinov3.models.backbone import Backbone, resolve_layer_indices
from dinov3.utils.dtype import autocast_to


class DINOBackbone(nn.Module):
    """Several layers of a frozen backbone as one map.

    The backbone's parameters are frozen and it stays in evaluation mode. Attributes: `stride` [pixels per cell],
    `num_channels` (one number), `autocast_dtype` that the backbone computes in (float32: as it is).

    Args:
        backbone: a `Backbone`. Maps of stages with other strides than the last are reduced to its grid.
        layers_to_use: how many of the last blocks, or which blocks; None: four at even intervals (all, if fewer).
        use_layernorm: a trained LayerNorm over the channels of each layer.

    Raises:
        ValueError: layers that do not exist.
    """

    def __init__(
        self, backbone: nn.Module, layers_to_use: int | list[int] | None = None, use_layernorm: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        for parameter in backbone.parameters():
            parameter.requires_grad_(False)
        protocol = self._protocol
        n_blocks = protocol.n_blocks
        if layers_to_use is None:
            layers_to_use = [m * n_blocks // 4 - 1 for m in range(1, 5)] if n_blocks >= 4 else n_blocks
        self.layers_to_use = resolve_layer_indices(layers_to_use, n_blocks)
        self.stride = protocol.stride
        widths = [protocol.embed_dims[i] for i in self.layers_to_use]
        self.num_channels = [sum(widths)]
        self.layer_norms = nn.ModuleList(LayerNorm2D(width) for width in widths) if use_layernorm else None
        self.autocast_dtype = torch.float32

    @property
    def _protocol(self) -> Backbone:
        return cast(Backbone, self.backbone)

    def train(self, mode: bool = True) -> "DINOBackbone":
        """The backbone stays in evaluation mode whatever is asked for."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` to `[B, sum of widths, H / stride, W / stride]`, in the images' dtype."""
        with torch.no_grad(), autocast_to(images.device, self.autocast_dtype):
            maps = self._protocol.get_intermediate_layers(images, self.layers_to_use, reshape=True)
        size = [side // self.stride for side in images.shape[-2:]]
        maps = tuple(_at_size(one, size).to(images.dtype) for one in maps)
        if self.layer_norms is not None:
            maps = tuple(norm(one) for norm, one in zip(self.layer_norms, maps, strict=True))
        return torch.cat(maps, dim=1)


def _at_size(feature_map: Tensor, size: list[int]) -> Tensor:
    """The map itself, or that of a stage of a convolutional network reduced to the grid of the last one."""
    if list(feature_map.shape[-2:]) == size:
        return feature_map
    return F.interpolate(feature_map.float(), size=size, mode="bilinear", align_corners=False, antialias=True)


class BackboneOutput(NamedTuple):
    """Of a batch of images.

    Attributes:
        features: `[B, C, h, w]`.
        mask: booleans `[B, h, w]`, true for cells whose top left pixel is padding.
        pos: position encoding `[B, hidden_dim, h, w]`.
    """

    features: Tensor
    mask: Tensor
    pos: Tensor


class BackboneWithPositions(nn.Sequential):
    """Feature extractor (entry 0) and position encodings (entry 1, one for each feature map: one)."""

    def __init__(self, backbone: nn.Module, encoding: nn.Module) -> None:
        super().__init__(backbone, nn.ModuleList([encoding]))
        self.stride: int = backbone.stride  # type: ignore[assignment]
        self.num_channels: list[int] = backbone.num_channels  # type: ignore[assignment]

    @property
    def extractor(self) -> DINOBackbone:
        """Without the windows."""
        first = self[0]
        return cast(DINOBackbone, first._backbone if isinstance(first, WindowsWrapper) else first)

    def forward(self, batch: NestedTensor) -> BackboneOutput:
        """Images on a canvas of any size: it is padded to a multiple of the stride."""
        batch = pad_to_multiple(batch, self.stride)
        features: Tensor = self[0](batch.tensors)
        mask = resize_mask(batch.mask, (features.shape[-2], features.shape[-1]))
        encode = cast(nn.ModuleList, self[1])[0]
        return BackboneOutput(features, mask, encode(NestedTensor(features, mask)))


def build_backbone(backbone_model: nn.Module, config: DetectionHeadConfig) -> BackboneWithPositions:
    """The frozen backbone with the windows and position encoding of the configuration.

    Raises:
        ValueError: layers that do not exist.
    """
    layers = config.layers_to_use
    layers = layers if layers is None or isinstance(layers, int) else list(layers)
    extractor: nn.Module = DINOBackbone(backbone_model, layers, config.backbone_use_layernorm)
    if config.n_windows_sqrt > 0:
        extractor = WindowsWrapper(extractor, config.n_windows_sqrt)
    return BackboneWithPositions(extractor, build_position_encoding(config))
