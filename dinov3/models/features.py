"""Features of frozen backbones: which layers, normed or not, in which precision, and how images fit the patch grid."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.models.backbone import Backbone, resolve_layer_indices
from dinov3.utils.dtype import as_torch_dtype, resolve_compute_dtype

Fit = Literal["crop", "pad", "resize"]


class BackboneLayersSet(Enum):
    """Sets of layers by name."""

    LAST = "LAST"
    FOUR_LAST = "FOUR_LAST"
    FOUR_EVEN_INTERVALS = "FOUR_EVEN_INTERVALS"


def layer_indices(layers: int | Sequence[int] | BackboneLayersSet | str, n_blocks: int) -> list[int]:
    """Block indices, ascending.

    Args:
        layers: a number of last blocks, block indices, or a named set.
        n_blocks: how many blocks the backbone has.

    Raises:
        ValueError: no such set, or blocks that do not exist or are repeated.
    """
    if isinstance(layers, str):
        layers = BackboneLayersSet(layers.upper())
    if not isinstance(layers, BackboneLayersSet):
        return resolve_layer_indices(layers, n_blocks)
    if layers is BackboneLayersSet.FOUR_EVEN_INTERVALS and n_blocks == 24:
        return [4, 11, 17, 23]  # 5 would be even, but the published ViT-L heads were trained on 4
    if layers is BackboneLayersSet.FOUR_EVEN_INTERVALS:
        return resolve_layer_indices([i * (n_blocks // 4) - 1 for i in range(1, 5)], n_blocks)
    return resolve_layer_indices(1 if layers is BackboneLayersSet.LAST else 4, n_blocks)


class PaddedImages(NamedTuple):
    """Images on a canvas whose sides are multiples of the patch.

    Attributes:
        images: `[B, C, H, W]`.
        valid: booleans `[B, h, w]`, true for patches that show enough of the image.
    """

    images: Tensor
    valid: Tensor


def pad_to_patches(
    images: Tensor | Sequence[Tensor],
    patch_size: int,
    *,
    position: Literal["top_left", "center"] = "top_left",
    value: float = 0.0,
    min_cover: float = 0.0,
) -> PaddedImages:
    """Pad images to the next multiples of the patch, so that every pixel is seen, and tell which patches are image.

    Args:
        images: a batch `[B, C, H, W]`, or images `[C, H, W]` of several sizes, which get one canvas for all.
        patch_size: what both sides become multiples of [pixels].
        position: where images lie on the canvas; in the centre, the odd pixel of padding goes right and below.
        value: of the padding. Images should be normalised before: 0 then is the mean colour.
        min_cover: patches are valid where the image covers more than this part of them; 0: any pixel at all.
    """
    if not isinstance(images, Tensor):
        return _pad_many(images, patch_size, position, value, min_cover)
    canvas = _round_up(images.shape[-2], images.shape[-1], patch_size)
    return _pad_to(images, canvas, patch_size, position, value, min_cover)


def resize_to_patches(images: Tensor, patch_size: int) -> Tensor:
    """Images `[..., H, W]` enlarged (bilinear) to the next multiples of the patch; unchanged if they are multiples."""
    size = _round_up(images.shape[-2], images.shape[-1], patch_size)
    if not torch.compiler.is_exporting() and size == tuple(images.shape[-2:]):  # the sizes of graphs are open
        return images
    flat = images.reshape(-1, *images.shape[-3:])
    resized = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    return resized.reshape(*images.shape[:-2], *size)


def autocast_context(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast to `dtype` on `device`; none for float32, and none on a CPU, which has no fast half precision."""
    dtype = resolve_compute_dtype(dtype, device)
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype=dtype) if half else nullcontext()


@torch.no_grad()  # and not inference mode: a sharded model that ran in it first could not be trained later
def take_layers(
    backbone: nn.Module,
    images: Tensor,
    layers: int | Sequence[int],
    autocast: AbstractContextManager[Any],
    **options: Any,
) -> Any:
    """What `backbone.get_intermediate_layers(images, n=layers, **options)` gives, without gradients, under autocast."""
    with autocast:
        return cast(Backbone, backbone).get_intermediate_layers(images, n=layers, **options)


class LayerFeatures(NamedTuple):
    """Output of one layer.

    Attributes:
        map: patch features `[B, D, h, w]`.
        class_token: `[B, D]`.
        storage_tokens: `[B, R, D]`.
    """

    map: Tensor
    class_token: Tensor
    storage_tokens: Tensor

    @property
    def tokens(self) -> Tensor:
        """Patch features `[B, h * w, D]`, row by row."""
        return self.map.flatten(2).transpose(1, 2)


class Features(NamedTuple):
    """Outputs of several layers for a batch of images.

    Attributes:
        layers: in block order.
        valid: booleans `[B, H / stride, W / stride]`: patches that show a part of the image; all, unless padded.
    """

    layers: tuple[LayerFeatures, ...]
    valid: Tensor


class FrozenFeatures(nn.Module):
    """A backbone that only gives features: in evaluation mode, without gradients.

    Images whose sides are no multiples of the backbone's stride are cropped (as the backbones do themselves), padded
    below and on the right, or enlarged.
    """

    def __init__(
        self,
        backbone: nn.Module,
        layers: int | Sequence[int] | BackboneLayersSet | str = 1,
        *,
        norm: bool = True,
        autocast_dtype: torch.dtype | str = torch.float32,
        fit: Fit = "crop",
    ) -> None:
        """Choose the features.

        Args:
            backbone: a `Backbone`; it is put into evaluation mode.
            layers: see `layer_indices`.
            norm: apply the final norm to each layer.
            autocast_dtype: to compute in; float32 is no autocast, as is half precision on a CPU without it.
            fit: how images fit the patch grid.
        """
        super().__init__()
        if fit not in ("crop", "pad", "resize"):
            raise ValueError(f"fit is 'crop', 'pad' or 'resize', got {fit!r}")
        self.backbone = backbone
        self.norm = norm
        self.autocast_dtype = as_torch_dtype(autocast_dtype)
        self.fit = fit
        self.indices = layer_indices(layers, self._protocol.n_blocks)
        self.embed_dims = [self._protocol.embed_dims[i] for i in self.indices]
        self.eval()

    @property
    def _protocol(self) -> Backbone:
        return cast(Backbone, self.backbone)

    def train(self, mode: bool = True) -> "FrozenFeatures":
        """The backbone stays in evaluation mode whatever is asked for."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Features:
        """Features of images `[B, C, H, W]`, in the dtype that the layers compute in."""
        return frozen_features(
            self.backbone,
            images,
            self.indices,
            norm=self.norm,
            autocast_dtype=self.autocast_dtype,
            fit=self.fit,
        )


@torch.no_grad()
def frozen_features(
    backbone: nn.Module,
    images: Tensor,
    indices: Sequence[int],
    *,
    norm: bool = True,
    autocast_dtype: torch.dtype = torch.float32,
    fit: Fit = "crop",
) -> Features:
    """What `FrozenFeatures` computes, for modules that hold the backbone themselves (and keep it in evaluation mode).

    Args:
        backbone: a `Backbone`.
        images: `[B, C, H, W]`.
        indices: of the blocks.
        norm, autocast_dtype, fit: see `FrozenFeatures`.
    """
    protocol = cast(Backbone, backbone)
    stride = protocol.stride
    height, width = images.shape[-2:]
    valid = images.new_ones((images.shape[0], height // stride, width // stride), dtype=torch.bool)
    if fit == "pad":
        images, valid = pad_to_patches(images, stride)
    elif fit == "resize":
        images = resize_to_patches(images, stride)
        valid = images.new_ones((images.shape[0], *(side // stride for side in images.shape[-2:])), dtype=torch.bool)
    outputs = take_layers(
        backbone,
        images,
        indices,
        autocast_context(images.device, autocast_dtype),
        reshape=True,
        return_class_token=True,
        return_extra_tokens=True,
        norm=norm,
    )
    return Features(tuple(LayerFeatures(*output) for output in outputs), valid)


def _round_up(height: int, width: int, multiple: int) -> tuple[int, int]:
    return (height + multiple - 1) // multiple * multiple, (width + multiple - 1) // multiple * multiple


def _pad_many(images: Sequence[Tensor], patch_size: int, position: str, value: float, min_cover: float) -> PaddedImages:
    sizes = [tuple(image.shape[-2:]) for image in images]
    if not sizes:
        raise ValueError("expected at least one image")
    canvas = _round_up(max(height for height, _ in sizes), max(width for _, width in sizes), patch_size)
    padded = [_pad_to(image[None], canvas, patch_size, position, value, min_cover) for image in images]
    return PaddedImages(torch.cat([one.images for one in padded]), torch.cat([one.valid for one in padded]))


def _pad_to(
    images: Tensor, canvas: tuple[int, int], patch_size: int, position: str, value: float, min_cover: float
) -> PaddedImages:
    if position not in ("top_left", "center"):
        raise ValueError(f"position is 'top_left' or 'center', got {position!r}")
    height, width = images.shape[-2:]
    rest = (canvas[0] - height, canvas[1] - width)
    top, left = (rest[0] // 2, rest[1] // 2) if position == "center" else (0, 0)
    padded = F.pad(images, (left, rest[1] - left, top, rest[0] - top), value=value)
    rows = _cover(canvas[0], top, height, patch_size, images.device)
    columns = _cover(canvas[1], left, width, patch_size, images.device)
    valid = rows[:, None] * columns[None, :] > min_cover
    return PaddedImages(padded, valid.expand(images.shape[0], -1, -1))


def _cover(canvas: int, start: int, length: int, patch_size: int, device: torch.device) -> Tensor:
    """Which part of each patch along one side is image."""
    pixels = torch.zeros(canvas, device=device)
    pixels[start : start + length] = 1
    return pixels.view(-1, patch_size).mean(dim=1)
