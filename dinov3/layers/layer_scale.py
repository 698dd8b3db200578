"""A learned factor per channel on the output of a residual branch."""

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """`x * gamma` over the last axis.

    Source: Touvron et al., Going deeper with image transformers (2021), eq. 4.
    """

    def __init__(
        self,
        dim: int,
        init_values: float = 1e-5,
        inplace: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.inplace = inplace
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill `gamma` with the initial value."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to `[..., dim]`."""
        return x.mul_(self.gamma) if self.inplace else x * self.gamma
