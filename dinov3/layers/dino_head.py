"""The projection head of the DINO and iBOT losses."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DINOHead(nn.Module):
    """MLP to a bottleneck, L2 normalisation, and a linear layer whose rows are the prototypes (no weight norm).

    Source: Caron et al., Emerging Properties in Self-Supervised Vision Transformers (2021), appendix C.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = _build_mlp(max(nlayers, 1), in_dim, hidden_dim, bottleneck_dim, use_bn, mlp_bias)
        self.last_layer = nn.Linear(bottleneck_dim, out_dim, bias=False)

    def init_weights(self) -> None:
        """Linear weights truncated normal with standard deviation 0.02, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm1d):
                module.reset_parameters()

    def forward(self, x: Tensor, no_last_layer: bool = False, only_last_layer: bool = False) -> Tensor:
        """Features `[..., in_dim]` to prototype logits `[..., out_dim]`.

        Args:
            x: features; with `only_last_layer` normalised bottleneck features `[..., bottleneck_dim]`.
            no_last_layer: stop at the normalised bottleneck features.
            only_last_layer: start from them.
        """
        if not only_last_layer:
            x = self.mlp(x)
            x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)  # 1e-12 is 0 in float16
        if not no_last_layer:
            x = self.last_layer(x)
        return x


def _build_mlp(
    nlayers: int, in_dim: int, hidden_dim: int, bottleneck_dim: int, use_bn: bool, bias: bool
) -> nn.Linear | nn.Sequential:
    if nlayers == 1:
        return nn.Linear(in_dim, bottleneck_dim, bias=bias)
    layers: list[nn.Module] = []
    for width_in in [in_dim] + [hidden_dim] * (nlayers - 2):
        layers.append(nn.Linear(width_in, hidden_dim, bias=bias))
        if use_bn:
            layers.append(nn.BatchNorm1d(hidden_dim))
        layers.append(nn.GELU())
    return nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim, bias=bias))
