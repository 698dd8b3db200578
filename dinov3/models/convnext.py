"""ConvNeXt: a convolutional backbone with the interface of the vision transformer; stages stand for blocks."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.layers.drop_path import DropPath, drop_path
from dinov3.layers.linear import apply_linear, apply_linear_and_activation
from dinov3.layers.patch_embed import log_cropping
from dinov3.models.backbone import resolve_layer_indices
from dinov3.utils.modules import named_apply

__all__ = ["Block", "ConvNeXt", "DropPath", "LayerNorm", "convnext_sizes", "drop_path", "get_convnext_arch"]

logger = logging.getLogger("dinov3")

Features = dict[str, Tensor | None]


class LayerNorm(nn.Module):
    """Layer normalisation over the channels of maps `[B, H, W, C]` (channels last) or `[B, C, H, W]` (first)."""

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-6,
        data_format: str = "channels_last",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if data_format not in ("channels_last", "channels_first"):
            raise ValueError(f"data_format is 'channels_last' or 'channels_first', got {data_format!r}")
        self.weight = nn.Parameter(torch.ones(normalized_shape, device=device))
        self.bias = nn.Parameter(torch.zeros(normalized_shape, device=device))
        self.eps = eps
        self.data_format = data_format
        self.normalized_shape = (normalized_shape,)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised maps, in the layout of the input."""
        if self.data_format == "channels_last":
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        # The result lies channels-last in memory, which is how the following convolutions and blocks want it.
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depth-wise 7 x 7 convolution, norm, and a two-layer network on each position, around a residual connection.

    Source: Liu et al., A ConvNet for the 2020s (2022), figure 4.
    """

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.layer_scale_init_value = layer_scale_init_value
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim, device=device)
        self.norm = LayerNorm(dim, eps=1e-6, device=device)
        self.pwconv1 = nn.Linear(dim, 4 * dim, device=device)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim, device=device)
        has_scale = layer_scale_init_value > 0
        gamma = torch.full((dim,), float(layer_scale_init_value), device=device)
        self.gamma = nn.Parameter(gamma) if has_scale else None
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def reset_parameters(self) -> None:
        """Set the layer scale to its initial value."""
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.layer_scale_init_value)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, H, W]`."""
        branch = self.dwconv(x).permute(0, 2, 3, 1)  # [B, H, W, C]
        branch = apply_linear(self.pwconv2, apply_linear_and_activation(self.pwconv1, self.act, self.norm(branch)))
        if self.gamma is not None and isinstance(self.drop_path, nn.Identity):  # one pass over memory
            return torch.addcmul(x.permute(0, 2, 3, 1), branch, self.gamma).permute(0, 3, 1, 2)
        if self.gamma is not None:
            branch = branch * self.gamma
        out: Tensor = x + self.drop_path(branch.permute(0, 3, 1, 2))
        return out


class ConvNeXt(nn.Module):
    """Four stages of `Block`s at strides 4, 8, 16 and 32; the class token is the mean over positions."""

    chunked_blocks = False
    n_blocks = 4
    n_storage_tokens = 0
    input_pad_size = 4
    stride = 32

    def __init__(
        self,
        in_chans: int = 3,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        patch_size: int | None = None,
        device: torch.device | str | None = None,
        **ignored_kwargs: Any,
    ) -> None:
        """Build the network; call `init_weights()` before training it from scratch.

        Args:
            in_chans: channels of the images.
            depths: blocks in each of the four stages.
            dims: widths of the stages.
            drop_path_rate: probability that a sample skips a block, growing linearly from 0 to this at the last block.
            layer_scale_init_value: initial layer scale; 0 leaves it out.
            patch_size: `get_intermediate_layers` resizes its maps to this stride [pixels]; None keeps each stage's own.
            device: of all parameters.
            ignored_kwargs: unknown options; they are logged and have no effect.
        """
        super().__init__()
        if ignored_kwargs:
            logger.warning(f"ConvNeXt: ignored unknown options {ignored_kwargs}")
        if len(depths) != self.n_blocks or len(dims) != self.n_blocks:
            raise ValueError(f"expected depths and dims of {self.n_blocks} stages, got {depths} and {dims}")
        self.in_chans = in_chans
        self.embed_dims = list(dims)
        self.embed_dim = self.num_features = dims[-1]
        self.patch_size = patch_size

        self.downsample_layers = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4, device=device),
                    LayerNorm(dims[0], data_format="channels_first", device=device),
                )
            ]
        )
        for dim_in, dim_out in zip(dims[:-1], dims[1:], strict=True):
            self.downsample_layers.append(
                nn.Sequential(
                    LayerNorm(dim_in, data_format="channels_first", device=device),
                    nn.Conv2d(dim_in, dim_out, kernel_size=2, stride=2, device=device),
                )
            )
        n_all = sum(depths)
        rates = iter([drop_path_rate * i / max(n_all - 1, 1) for i in range(n_all)])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, next(rates), layer_scale_init_value, device=device) for _ in range(depth)))
            for depth, dim in zip(depths, dims, strict=True)
        )
        self.norm = nn.LayerNorm(self.embed_dim, eps=1e-6, device=device)
        self.head = nn.Identity()
        # The last norm under a second name: released files hold both.
        self.norms = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Identity(), self.norm])

    def wrap_units(self) -> list[nn.Module]:
        """Down-sampling layers and stages, alternating."""
        return [unit for pair in zip(self.downsample_layers, self.stages, strict=True) for unit in pair]

    def checkpoint_units(self) -> list[nn.Module]:
        """Down-sampling layers, each followed by the blocks of its stage."""
        return [
            unit
            for downsample, stage in zip(self.downsample_layers, self.stages, strict=True)
            for unit in (downsample, *stage.children())
        ]

    def init_weights(self) -> None:
        """Initialise every parameter, also after `to_empty()`."""
        named_apply(_init_weights, self)

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
        is_training: bool = False,
    ) -> Any:
        """Normed class tokens `[B, C]` of images `[B, 3, H, W]`, or a list of them for a list.

        With `is_training` returns what `forward_features` returns.
        """
        features = self.forward_features(x, masks)
        if is_training:
            return features
        if isinstance(features, list):
            return [self.head(entry["x_norm_clstoken"]) for entry in features]
        return self.head(features["x_norm_clstoken"])

    def forward_features(
        self, x: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor | None] | None = None
    ) -> Features | list[Features]:
        """The last stage as tokens, normed; for a list of images of several sizes a list.

        Args:
            x: images `[B, 3, H, W]`, or a list of them.
            masks: handed back; a convolutional network masks nothing.

        Returns:
            A dict: `x_norm_clstoken` `[B, C]` (of the mean over positions), `x_storage_tokens` `[B, 0, C]`,
            `x_norm_patchtokens` `[B, P, C]`, `x_prenorm` `[B, P, C]` (positions alone), `masks`.
        """
        if isinstance(x, Tensor):
            return self._forward_one(x, masks)  # type: ignore[arg-type]
        masks = [None] * len(x) if masks is None else list(masks)
        return [self._forward_one(images, mask) for images, mask in zip(x, masks, strict=True)]

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
        """Outputs of some stages, in order; stages after the last one asked for are not run.

        Args:
            x: images `[B, 3, H, W]`.
            n: the number of last stages, or distinct stage indices (negative ones count from the end).
            reshape: maps `[B, C, h, w]` instead of tokens `[B, h * w, C]`.
            return_class_token: add the means over positions `[B, C]`.
            return_extra_tokens: add storage tokens, of which there are none: `[B, 0, C]`.
            norm: apply the final norm to the last stage; the others have none.

        Returns:
            Per stage the maps, or a tuple (maps[, class][, storage]).

        Raises:
            ValueError: stages that do not exist or are repeated, or images too small for them.
        """
        indices = resolve_layer_indices(n, self.n_blocks)
        outputs = []
        for index, features in enumerate(self._run_stages(x, indices[-1] + 1)):
            if index in indices:
                norm_layer = self.norms[index] if norm else nn.Identity()
                outputs.append(
                    self._pack(features, x.shape[-2:], norm_layer, reshape, return_class_token, return_extra_tokens)
                )
        return tuple(outputs)

    def _forward_one(self, images: Tensor, masks: Tensor | None) -> Features:
        features = self._run_stages(images, self.n_blocks)[-1]
        positions = features.flatten(2).transpose(1, 2)  # [B, P, C]
        normed = self.norm(torch.cat([positions.mean(dim=1, keepdim=True), positions], dim=1))
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_storage_tokens": normed[:, 1:1],
            "x_norm_patchtokens": normed[:, 1:],
            "x_prenorm": positions,
            "masks": masks,
        }

    def _run_stages(self, images: Tensor, n_stages: int) -> list[Tensor]:
        """Maps `[B, C, h, w]` after each of the first stages."""
        self._check_size(images, stride=4 * 2 ** (n_stages - 1))
        outputs, x = [], images
        for downsample, stage in zip(self.downsample_layers[:n_stages], self.stages[:n_stages], strict=True):
            x = stage(downsample(x))
            outputs.append(x)
        return outputs

    def _check_size(self, images: Tensor, stride: int) -> None:
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"got a tensor of shape {tuple(images.shape)}, expected images [B, {self.in_chans}, H, W]")
        height, width = images.shape[-2:]
        if min(height, width) < stride:
            raise ValueError(
                f"an image of {height} x {width} pixels is too small: these stages need {stride} x {stride}; resize "
                "it, or pad it with dinov3.models.features.pad_to_patches"
            )
        kept = (height - height % stride, width - width % stride)
        if kept != (height, width) and not torch.compiler.is_compiling():
            log_cropping(height, width, *kept)

    def _pack(
        self,
        features: Tensor,
        image_size: torch.Size,
        norm_layer: nn.Module,
        reshape: bool,
        return_class_token: bool,
        return_extra_tokens: bool,
    ) -> Tensor | tuple[Tensor, ...]:
        mean = features.mean(dim=(-2, -1)).unsqueeze(1)  # [B, 1, C], before any resizing
        if self.patch_size is not None:
            size = (image_size[0] // self.patch_size, image_size[1] // self.patch_size)
            features = F.interpolate(features, size=size, mode="bilinear", antialias=True, align_corners=False)
        normed = norm_layer(torch.cat([mean, features.flatten(2).transpose(1, 2)], dim=1))
        patches = normed[:, 1:]
        if reshape:
            patches = patches.transpose(1, 2).reshape(features.shape).contiguous()
        parts = [patches]
        parts += [normed[:, 0]] if return_class_token else []
        parts += [normed[:, 1:1]] if return_extra_tokens else []
        return parts[0] if len(parts) == 1 else tuple(parts)


def _init_weights(module: nn.Module, name: str = "") -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, LayerNorm | nn.LayerNorm | Block):
        module.reset_parameters()


convnext_sizes: dict[str, dict[str, Any]] = {
    "tiny": {"depths": [3, 3, 9, 3], "dims": [96, 192, 384, 768]},
    "small": {"depths": [3, 3, 27, 3], "dims": [96, 192, 384, 768]},
    "base": {"depths": [3, 3, 27, 3], "dims": [128, 256, 512, 1024]},
    "large": {"depths": [3, 3, 27, 3], "dims": [192, 384, 768, 1536]},
}


def get_convnext_arch(arch_name: str) -> Callable[..., ConvNeXt]:
    """The constructor of `convnext_<size>`.

    Raises:
        NotImplementedError: no such size.
    """
    size = arch_name.removeprefix("convnext_")
    if size not in convnext_sizes:
        names = ", ".join(f"convnext_{name}" for name in convnext_sizes)
        raise NotImplementedError(f"no ConvNeXt {arch_name!r}; there are {names}")
    return partial(ConvNeXt, **convnext_sizes[size])
