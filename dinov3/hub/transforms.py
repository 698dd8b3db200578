"""The image transform of the released models."""

from typing import Any

from dinov3.hub.registry import NORMALIZATIONS, Normalization, Weights


def make_transform(
    resize_size: int = 256, *, weights: Weights | str = Weights.LVD1689M, normalization: Normalization | None = None
) -> Any:
    """A transform from a PIL image or uint8 tensor to the float32 tensor `[3, s, s]` that a released model expects.

    Resized to a square with bilinear, antialiased interpolation, scaled to [0, 1], normalised. Needs torchvision.

    Args:
        resize_size: side s [pixels].
        weights: those of the model, which give mean and standard deviation.
        normalization: other statistics.
    """
    if normalization is None:
        normalization = NORMALIZATIONS[Weights(weights)]
    return make_dense_transform(resize_size, normalization=normalization, square=True)


def make_dense_transform(resize_size: int | None = None, *, normalization: Normalization, square: bool = False) -> Any:
    """A transform from a PIL image or uint8 tensor to a normalised float32 tensor `[3, H, W]`, for dense predictions.

    Resized with bilinear, antialiased interpolation. Needs torchvision.

    Args:
        resize_size: shorter side [pixels]; None: images stay as they are.
        normalization: mean and standard deviation.
        square: resize both sides instead.
    """
    import torch
    from torchvision.transforms import v2

    size = (resize_size, resize_size) if square else resize_size
    resize = [] if resize_size is None else [v2.Resize(size, antialias=True)]
    return v2.Compose(
        [
            v2.ToImage(),
            *resize,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(normalization.mean, normalization.std),
        ]
    )
