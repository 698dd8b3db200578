"""Small modules of the detector."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2D(nn.Module):
    """LayerNorm over the channels of a map `[N, C, H, W]`."""

    def __init__(self, normalized_shape: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(normalized_shape)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` to the same."""
        normed: Tensor = self.ln(x.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in zip(widths[:-1], widths[1:], strict=True))

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        return cast(nn.Linear, self.layers[-1])

    def forward(self, x: Tensor) -> Tensor:
        """`[..., input_dim]` to `[..., output_dim]`."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        result: Tensor = last(x)
        return result
