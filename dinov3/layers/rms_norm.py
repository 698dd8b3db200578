"""Root-mean-square normalisation."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps)` in float32, cast back to the dtype of x, then times `weight`.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019), eq. 4.
    """

    def __init__(self, dim: int, eps: float = 1e-5, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device))

    def reset_parameters(self) -> None:
        """Fill `weight` with ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to `[..., dim]`; the result has the wider dtype of x and `weight`."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight

    def extra_repr(self) -> str:
        """Width and eps."""
        return f"{self.weight.numel()}, eps={self.eps}"
