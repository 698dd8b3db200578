"""Plain maths of depth maps: the bins of the canopy-height head, alignment of predictions with the truth."""

import math

import torch
from torch import Tensor

MIXLOG_SCALE = 8.0
"""Canopy heights are predicted in units of 8 m: bins go up to an eighth of the maximum, the result is multiplied."""


def linear_bins(min_depth: float, max_depth: float, n_bins: int, device: torch.device | None = None) -> Tensor:
    """Depths in equal steps, float32 `[n_bins]`."""
    return torch.linspace(min_depth, max_depth, n_bins, device=device)


def log_bins(min_depth: float, max_depth: float, n_bins: int, device: torch.device | None = None) -> Tensor:
    """Depths in equal ratios, float32 `[n_bins]`; `min_depth` must be positive."""
    if min_depth <= 0:
        raise ValueError(f"logarithmic bins need min_depth > 0, got {min_depth}")
    return torch.linspace(math.log(min_depth), math.log(max_depth), n_bins, device=device).exp()


def create_chmv2_mixlog_bins(
    min_depth: float, max_depth: float, n_bins: int, device: torch.device | None = None
) -> Tensor:
    """Bins that go over from logarithmic to linear spacing, in units of 8 m: float32 `[n_bins]`.

    With M = max_depth / 8 and t from 1 to 0: t log-bin(min_depth, M) + (1 - t) linear-bin(min_depth, M). `min_depth` is
    in these units already. As in the released canopy-height head (CHMv2).
    """
    top = max_depth / MIXLOG_SCALE
    t = torch.linspace(1.0, 0.0, n_bins, device=device)
    return t * log_bins(min_depth, top, n_bins, device) + (1 - t) * linear_bins(min_depth, top, n_bins, device)


def align_depth_least_square(gt: Tensor, pred: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and shift of a prediction that bring it closest to the truth, by least squares over valid pixels.

    Solved by the normal equations in float64, on centred values, on the tensors' device (in float32 on devices that
    have no float64). All pixels count together; call it for one image at a time.

    Args:
        gt: true depth, any shape.
        pred: predicted depth, same shape.
        mask: booleans of the same shape.

    Returns:
        `scale * pred + shift` in the dtype of `pred`, scale and shift (float32 scalars on the device). Where there is
        no solution (fewer than two valid pixels, a constant prediction, values that are not finite) scale is 1 and
        shift 0.
    """
    dtype = torch.float32 if pred.device.type == "mps" else torch.float64
    weight = mask.to(dtype)
    # `where`, not a product: invalid pixels may hold NaN.
    x, y = (torch.where(mask, value, 0).to(dtype) for value in (pred, gt))
    count = weight.sum().clamp(min=1)
    x_mean, y_mean = x.sum() / count, y.sum() / count
    x_centred = (x - x_mean) * weight
    variance = x_centred.square().sum()
    scale = (x_centred * (y - y_mean)).sum() / variance
    shift = y_mean - scale * x_mean
    # A prediction that is constant up to rounding has a variance of about count * (eps * mean)^2.
    solvable = variance > count * (torch.finfo(pred.dtype).eps * x_mean).square()
    solvable = solvable & torch.isfinite(scale) & torch.isfinite(shift)
    scale, shift = torch.where(solvable, scale, 1.0), torch.where(solvable, shift, 0.0)
    aligned = (pred.to(dtype) * scale + shift).to(pred.dtype)
    return aligned, scale.float(), shift.float()
