"""Stochastic depth: residual branches that skip samples during training.

Two forms, both with an expected value equal to the full branch: `add_to_random_subset` computes the branch for a random
subset of the batch only, which saves its cost (ViT); `DropPath` zeroes the output of single samples (ConvNeXt).

Source: Huang et al., Deep Networks with Stochastic Depth (2016); the subset form: DINOv2 (2023), section 5.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def add_to_random_subset(x: Tensor, branch: Callable[[Tensor, Tensor], Tensor], drop_prob: float) -> Tensor:
    """`x`, with `branch` added for a random subset of its samples, scaled by batch size over subset size.

    Args:
        x: residual stream `[B, ...]`.
        branch: called with the chosen samples `[S, ...]` and their indices `[S]`; returns `[S, ...]`.
        drop_prob: part of the batch that is left out; S = max(int(B * (1 - drop_prob)), 1).

    Note: draws one random permutation of B numbers on the device of x.
    """
    chosen, scale = draw_subset(x.shape[0], drop_prob, x.device)
    residual = branch(x.index_select(0, chosen), chosen)
    return torch.index_add(x, 0, chosen, residual.to(x.dtype), alpha=scale)


def draw_subset(batch: int, drop_prob: float, device: torch.device) -> tuple[Tensor, float]:
    """Indices `[S]` of a random subset of a batch, and the factor on its branch; see `add_to_random_subset`."""
    kept = max(int(batch * (1 - drop_prob)), 1)
    return torch.randperm(batch, device=device)[:kept], batch / kept


def rows_of_subset(rows: Tensor, n_tokens: int, chosen: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Those of some tokens that belong to chosen samples, and where they stand among the tokens of these.

    Args:
        rows: numbers of the tokens `[M]`, out of `batch * n_tokens`.
        n_tokens: of each sample.
        chosen: indices of the chosen samples `[S]`.
        batch: number of samples.

    Returns:
        Positions in `rows`, and numbers out of `S * n_tokens`; as many.
    """
    place = torch.full((batch,), -1, device=rows.device)  # of each sample among the chosen ones
    place[chosen] = torch.arange(len(chosen), device=rows.device)
    places = place[rows // n_tokens]
    kept = (places >= 0).nonzero().squeeze(1)
    return kept, places[kept] * n_tokens + rows[kept] % n_tokens


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False, scale_by_keep: bool = True) -> Tensor:
    """`x` with each sample set to zero with probability `drop_prob`, the others divided by `1 - drop_prob`.

    Args:
        x: output of a residual branch `[B, ...]`.
        drop_prob: probability that a sample is dropped.
        training: False returns x as it is.
        scale_by_keep: False leaves the kept samples undivided.
    """
    if drop_prob == 0.0 or not training:
        return x
    keep = 1 - drop_prob
    kept = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device) >= drop_prob
    factor = 1 / keep if scale_by_keep and keep > 0.0 else 1.0
    return x * (kept.to(x.dtype) * factor)


class DropPath(nn.Module):
    """`drop_path` as a module, active in training mode."""

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        if not 0.0 <= drop_prob <= 1.0:
            raise ValueError(f"drop_prob is a probability, got {drop_prob}")
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        """`[B, ...]` to `[B, ...]`."""
        return drop_path(x, self.drop_prob, self.training, self.scale_by_keep)

    def extra_repr(self) -> str:
        """Drop probability."""
        return f"drop_prob={self.drop_prob:.3f}"
