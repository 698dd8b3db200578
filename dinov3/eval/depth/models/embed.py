"""How images whose sides are no multiples of the patch get onto the patch grid: padded around, or enlarged."""

from torch import Tensor, nn

from dinov3.eval.depth.config import PatchSizeAdaptationStrategy
from dinov3.models.features import pad_to_patches, resize_to_patches


def patch_size_adapter(strategy: PatchSizeAdaptationStrategy | str, multiple: int) -> nn.Module:
    """The module that does it.

    Args:
        strategy: a member or its value.
        multiple: what sides become multiples of [pixels].
    """
    strategy = PatchSizeAdaptationStrategy(strategy)
    if strategy is PatchSizeAdaptationStrategy.CENTER_PADDING:
        return CenterPadding(multiple)
    return StretchToMultiple(multiple) if strategy is PatchSizeAdaptationStrategy.STRETCH else nn.Identity()


class CenterPadding(nn.Module):
    """Zeros around normalised images, up to the next multiples; the odd pixel goes to the right and below."""

    def __init__(self, multiple: int) -> None:
        super().__init__()
        self.multiple = _positive(multiple)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` on a larger canvas."""
        return pad_to_patches(x, self.multiple, position="center").images

    def extra_repr(self) -> str:
        """For `print(module)`."""
        return f"multiple={self.multiple}"


class StretchToMultiple(nn.Module):
    """Images enlarged (bilinear) to the next multiples; those that fit are unchanged."""

    def __init__(self, multiple: int) -> None:
        super().__init__()
        self.multiple = _positive(multiple)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[..., C, H, W]`, enlarged."""
        return resize_to_patches(x, self.multiple)

    def extra_repr(self) -> str:
        """For `print(module)`."""
        return f"multiple={self.multiple}"


def _positive(multiple: int) -> int:
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1 pixel, got {multiple}")
    return multiple
