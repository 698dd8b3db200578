"""Sizes of pictures whose sides are multiples of the patch, and the pixels of patches."""

from torch import Tensor


def resize_to_patches(width: int, height: int, image_size: int = 768, patch_size: int = 16) -> tuple[int, int]:
    """Size of a picture of about `image_size` pixels in height, its aspect kept up to rounding down to patches.

    Args:
        width, height: of the picture, in pixels.
        image_size: wanted height in pixels.
        patch_size: of the backbone.

    Returns:
        (height, width) in pixels, multiples of the patch.

    Raises:
        ValueError: a side would be smaller than a patch.
    """
    _check_positive(width=width, height=height, image_size=image_size, patch_size=patch_size)
    rows, columns = image_size // patch_size, width * image_size // (height * patch_size)
    if rows == 0 or columns == 0:
        raise ValueError(
            f"a picture of {width} x {height} pixels resized to height {image_size} is less than a patch of "
            f"{patch_size} pixels wide or high: choose a larger image_size"
        )
    return rows * patch_size, columns * patch_size


def resize_to_multiple(width: int, height: int, short_side: int, multiple: int) -> tuple[int, int]:
    """Size of a picture whose short side is `short_side`, both sides rounded up to multiples.

    Args:
        width, height: of the picture, in pixels.
        short_side: wanted, in pixels.
        multiple: what both sides become multiples of.

    Returns:
        (height, width) in pixels.
    """
    _check_positive(width=width, height=height, short_side=short_side, multiple=multiple)
    short = -(-short_side // multiple) * multiple
    long = -(-short * max(width, height) // (min(width, height) * multiple)) * multiple
    return (short, long) if width > height else (long, short)


def patch_means(mask: Tensor, patch_size: int) -> Tensor:
    """Mean of a mask `[H, W]` with values in [0, 1] over each patch: float32 `[H / patch_size, W / patch_size]`."""
    if mask.ndim != 2 or mask.shape[0] % patch_size or mask.shape[1] % patch_size:
        raise ValueError(f"expected a mask [H, W] with sides divisible by {patch_size}, got {tuple(mask.shape)}")
    rows, columns = mask.shape[0] // patch_size, mask.shape[1] // patch_size
    return mask.float().view(rows, patch_size, columns, patch_size).mean(dim=(1, 3))


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
