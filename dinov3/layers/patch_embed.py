"""Image to patch tokens."""

import functools
import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

logger = logging.getLogger("dinov3")


class PatchEmbed(nn.Module):
    """Linear projection of non-overlapping patches, as a convolution with kernel and stride equal to the patch.

    Pixels to the right and at the bottom that do not fill a patch are dropped.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten_embedding: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        """`img_size` only sets the informative attributes `patches_resolution` and `num_patches`."""
        super().__init__()
        self.img_size = _pair(img_size)
        self.patch_size = _pair(patch_size)
        self.patches_resolution = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
        self.num_patches = math.prod(self.patches_resolution)
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.flatten_embedding = flatten_embedding
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, stride=self.patch_size, device=device)
        self.norm = norm_layer(embed_dim, device=device) if norm_layer else nn.Identity()

    def reset_parameters(self) -> None:
        """Projection weight and bias uniform within 1 / sqrt(in_chans * patch height squared)."""
        bound = (self.in_chans * self.patch_size[0] ** 2) ** -0.5
        nn.init.uniform_(self.proj.weight, -bound, bound)
        if self.proj.bias is not None:
            nn.init.uniform_(self.proj.bias, -bound, bound)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of this size [pixels].

        Raises:
            ValueError: a side is shorter than one patch.
        """
        rows, columns = height // self.patch_size[0], width // self.patch_size[1]
        if rows == 0 or columns == 0:
            raise ValueError(
                f"an image of {height} x {width} pixels is smaller than one patch of {self.patch_size[0]} x "
                f"{self.patch_size[1]}: resize it, or pad it with dinov3.models.features.pad_to_patches"
            )
        return rows, columns

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to tokens `[B, h * w, D]`, or to a map `[B, h, w, D]` with `flatten_embedding=False`.

        Raises:
            ValueError: wrong number of axes or channels, or a side shorter than one patch.
        """
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"got a tensor of shape {tuple(x.shape)}, expected images [B, {self.in_chans}, H, W]")
        height, width = x.shape[-2:]
        rows, columns = self.grid_size(height, width)
        kept = (rows * self.patch_size[0], columns * self.patch_size[1])
        if not torch.compiler.is_compiling() and kept != (height, width):
            log_cropping(height, width, *kept)
        tokens: Tensor = self.norm(self.proj(x).flatten(2).transpose(1, 2))  # [B, h * w, D]
        return tokens if self.flatten_embedding else tokens.reshape(x.shape[0], rows, columns, -1)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


@functools.cache  # one line per image size, not per batch
def log_cropping(height: int, width: int, kept_height: int, kept_width: int) -> None:
    """Say once per size [pixels] that pixels are dropped, and how to keep them."""
    logger.info(
        f"images of {height} x {width} pixels do not divide into patches: only their upper left {kept_height} x "
        f"{kept_width} pixels are seen (dinov3.models.features.pad_to_patches keeps every pixel; or resize)"
    )
