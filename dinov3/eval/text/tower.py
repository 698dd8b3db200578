"""What both towers of dino.txt share: a head on a backbone's tokens, and a tower that may keep its backbone frozen."""

from typing import Any, cast

from torch import Tensor, nn


class TokenHead(nn.Module):
    """Blocks, a norm and a linear projection; which blocks, and how all start, is up to the tower.

    Attributes:
        input_dim: width of the tokens.
        blocks: a list of blocks, perhaps empty.
        ln_final: the norm, nothing without blocks.
        linear_projection: without bias, nothing where the widths are equal.
    """

    input_dim: int
    blocks: nn.ModuleList
    ln_final: nn.Module
    linear_projection: nn.Module

    def forward(self, tokens: Tensor) -> Tensor:
        """Token features `[B, N, input_dim]` to tokens of the width of the projection."""
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.linear_projection(self.ln_final(tokens))
        return out

    def init_projection(self) -> None:
        """Random weights that keep the size of the tokens."""
        if isinstance(self.linear_projection, nn.Linear):
            nn.init.normal_(self.linear_projection.weight, std=self.input_dim**-0.5)

    def wrap_units(self) -> list[nn.Module]:
        """The blocks and the projection, as far as they are there."""
        return [*self.blocks, *([self.linear_projection] if isinstance(self.linear_projection, nn.Linear) else [])]

    def checkpoint_units(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.blocks)


class Tower(nn.Module):
    """A backbone and a head on its tokens.

    Attributes:
        backbone: with `init_weights()`.
        head: with `init_weights()`.
        freeze_backbone: no gradients for the backbone, which stays in evaluation mode.
    """

    backbone: nn.Module
    head: nn.Module
    freeze_backbone: bool

    def freeze(self) -> None:
        """Freeze the backbone if it is to be."""
        if self.freeze_backbone:
            self.backbone.requires_grad_(False).eval()

    def init_weights(self) -> None:
        """Random weights, the backbone's too."""
        for part in (self.backbone, self.head):
            cast(Any, part).init_weights()

    def train(self, mode: bool = True) -> "Tower":
        """A frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self
