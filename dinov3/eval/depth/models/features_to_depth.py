"""From K channels to depth: a weighted mean of K fixed depths (bins).

Bhat et al., AdaBins, https://arxiv.org/abs/2011.14141, with fixed bins.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dinov3.eval.depth.utils import MIXLOG_SCALE, create_chmv2_mixlog_bins, linear_bins, log_bins
from dinov3.utils.dtype import autocast_to

_TINY = 1e-12

_BINS: dict[str, Callable[..., Tensor]] = {
    "linear": linear_bins,
    "log": log_bins,
    "chmv2_mixlog": create_chmv2_mixlog_bins,
}

# Weights before they are divided by their sum: a function of the logits, and what is added to each.
_WEIGHTS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "linear": (torch.relu, 0.1),
    "softmax": (lambda x: torch.softmax(x, dim=1), 0.0),
    "sigmoid": (torch.sigmoid, 0.0),
    "chmv2_mixlog": (torch.relu, 1e-8),
}


class FeaturesToDepth(nn.Module):
    """Depth of K logits per pixel: sum_k w_k b_k with weights w (sum 1) and bins b; without parameters.

    With K = 1: relu(x) + min_depth.

    Args:
        min_depth, max_depth: of the bins [metres].
        bins_strategy: "linear", "log" (equal ratios), "chmv2_mixlog" (from logarithmic to linear, up to max_depth / 8).
        norm_strategy: "linear" (relu(x) + 0.1), "softmax", "sigmoid", "chmv2_mixlog" (relu(x) + 1e-8; the result is
            multiplied by 8, which fits the bins of the same name).

    Raises:
        ValueError: unknown strategy, or an empty range.
    """

    def __init__(
        self,
        min_depth: float = 0.001,
        max_depth: float = 80,
        bins_strategy: str = "linear",
        norm_strategy: str = "linear",
    ) -> None:
        super().__init__()
        if bins_strategy not in _BINS:
            raise ValueError(f"unknown bins_strategy {bins_strategy!r}; known: {', '.join(_BINS)}")
        if norm_strategy not in _WEIGHTS:
            raise ValueError(f"unknown norm_strategy {norm_strategy!r}; known: {', '.join(_WEIGHTS)}")
        if not min_depth < max_depth:
            raise ValueError(f"min_depth must be below max_depth, got {min_depth} and {max_depth}")
        self.min_depth, self.max_depth = min_depth, max_depth
        self.bins_strategy, self.norm_strategy = bins_strategy, norm_strategy

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 1, H, W]` of logits `[B, K, H, W]`, in float32 at least (float64 stays)."""
        with autocast_to(x.device, torch.float32):
            x = x if x.dtype == torch.float64 else x.float()
            return torch.relu(x) + self.min_depth if x.shape[1] == 1 else self._from_bins(x)

    def _from_bins(self, x: Tensor) -> Tensor:
        n_bins = x.shape[1]
        bins = _BINS[self.bins_strategy](self.min_depth, self.max_depth, n_bins, device=x.device).to(x.dtype)
        mixlog = self.norm_strategy == "chmv2_mixlog"
        if mixlog:
            bins = bins.clamp(min=_TINY)
        weigh, offset = _WEIGHTS[self.norm_strategy]
        # The weighted sum of bins and the sum of weights in one pass over the large tensor. The offset, the same for
        # all weights, is added to the two sums instead.
        columns = torch.stack([bins, torch.ones_like(bins)])  # [2, K]
        sums = torch.einsum("bkhw,ck->bchw", weigh(x), columns) + offset * columns.sum(dim=1)[None, :, None, None]
        weighted, total = sums[:, :1], sums[:, 1:]
        if not mixlog:
            return weighted / total
        total = torch.where(torch.isfinite(total), total, 1.0).clamp(min=_TINY)
        return (weighted / total).clamp(min=_TINY) * MIXLOG_SCALE
