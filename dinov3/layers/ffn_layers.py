"""Feed-forward networks of the transformer blocks."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.layers.linear import apply_linear, feed_forward
from dinov3.utils.tensors import cat_keep_shapes, uncat_with_shapes


class ListForwardMixin:
    """`forward_list` for modules that act on the last axis alone: one pass over all entries."""

    forward: Callable[[Tensor], Tensor]

    def forward_list(self, x_list: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for tensors `[..., D]` whose leading axes may differ."""
        flat, shapes, counts = cat_keep_shapes(x_list)
        return uncat_with_shapes(self.forward(flat), shapes, counts)


class Mlp(nn.Module, ListForwardMixin):
    """Two linear layers with an activation (exact GELU by default) between, dropout after each."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        drop: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias, device=device)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias, device=device)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        out: Tensor = self.drop(feed_forward(x, self.fc1, self.act, self.drop, self.fc2))
        return out


class SwiGLUFFN(nn.Module, ListForwardMixin):
    """Gated feed-forward `w3(silu(w1 x) * w2 x)`.

    Its hidden width is two thirds of `hidden_features` (three matrices then cost what two would), rounded up to a
    multiple of `align_to`.

    Source: Shazeer, GLU Variants Improve Transformer (2020), eq. 6.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
        align_to: int = 8,
        device: torch.device | str | None = None,
    ) -> None:
        """`act_layer` and `drop` are there for the signature of `Mlp`; the gate is always SiLU, without dropout."""
        super().__init__()
        width = int((hidden_features or in_features) * 2 / 3)
        hidden = -(-width // align_to) * align_to
        self.w1 = nn.Linear(in_features, hidden, bias=bias, device=device)
        self.w2 = nn.Linear(in_features, hidden, bias=bias, device=device)
        self.w3 = nn.Linear(hidden, out_features or in_features, bias=bias, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        gated = F.silu(apply_linear(self.w1, x)) * apply_linear(self.w2, x)
        return apply_linear(self.w3, gated)
