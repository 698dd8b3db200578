"""How close predicted depths are to the truth."""

import torch
from torch import Tensor

METRICS = ("a1", "a2", "a3", "abs_rel", "rmse", "log_10", "rmse_log", "silog", "sq_rel", "mae")
"""In the order of result files. Of a1, a2, a3 larger is better, of the others smaller."""

_THRESHOLD = 1.25


def check_metrics(names: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """The names, if all are known.

    Raises:
        ValueError: unknown name.
    """
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"unknown metrics {unknown}; known: {', '.join(METRICS)}")
    return tuple(names)


def calculate_depth_metrics(gt: Tensor, pred: Tensor, valid_mask: Tensor) -> dict[str, Tensor]:
    """All metrics over the valid pixels of these maps together.

    With e = gt - pred, l = ln gt - ln pred, r = max(gt / pred, pred / gt): a1, a2, a3: part of the pixels with
    r < 1.25, 1.25^2, 1.25^3; abs_rel mean |e| / gt; sq_rel mean e^2 / gt; rmse sqrt mean e^2 [m]; mae mean |e| [m];
    rmse_log sqrt mean l^2; log_10 mean |log10 gt - log10 pred|; silog 100 sqrt(mean l^2 - (mean l)^2).

    Args:
        gt: true depth [metres], any shape; pixels where it isn't positive don't count.
        pred: predicted depth, same shape, positive where it counts.
        valid_mask: booleans, same shape.

    Returns:
        float32 scalars on the device, in the order of `METRICS`. Without valid pixels silog is 0, all others NaN (the
        evaluation leaves such images out).
    """
    mask = valid_mask & (gt > 0)
    dtype = torch.float32 if pred.device.type == "mps" else torch.float64
    gt, pred = gt[mask].to(dtype), pred[mask].to(dtype)
    error = gt - pred
    log_error = gt.log() - pred.log()
    ratio = torch.maximum(gt / pred, pred / gt)
    silog = 100 * (log_error.square().mean() - log_error.mean().square()).sqrt()
    values = {
        **{f"a{k}": (ratio < _THRESHOLD**k).to(dtype).mean() for k in (1, 2, 3)},
        "abs_rel": (error.abs() / gt).mean(),
        "rmse": error.square().mean().sqrt(),
        "log_10": (gt.log10() - pred.log10()).abs().mean(),
        "rmse_log": log_error.square().mean().sqrt(),
        "silog": torch.nan_to_num(silog, nan=0.0),
        "sq_rel": (error.square() / gt).mean(),
        "mae": error.abs().mean(),
    }
    return {name: values[name].float() for name in METRICS}
