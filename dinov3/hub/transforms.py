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
    import torch
    from torchvision.transforms import v2

    if normalization is None:
        normalization = NORMALIZATIONS[Weights(weights)]
    return v2.Compose(
        [
            v2.ToImage(),
            v2.Resize((resize_size, resize_size), interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(normalization.mean, normalization.std),
        ]
    )
