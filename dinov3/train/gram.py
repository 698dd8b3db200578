"""Gram anchoring: when the Gram teacher changes (pure logic) and which features the loss compares.

The loss itself is `dinov3.loss.GramLoss`; the network lives in `SSLMetaArch`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class GramLifecycle:
    """When the Gram teacher is loaded and refreshed (DINOv3 paper, section 4; iterations are 0-based).

    Attributes:
        use_loss: whether there is a Gram loss at all.
        ema_teacher: the EMA teacher itself is the Gram teacher; there is no separate network.
        ckpt: weights of the Gram teacher, or None.
        it_load_ema_teacher: iteration at whose start the EMA teacher is copied into the Gram teacher; negative: never.
        rep_update: refresh the Gram teacher from the EMA teacher repeatedly.
        update_frequency, it_first_update, max_updates: refresh after iteration `it` when `it + 1` is a multiple of the
            frequency, has reached the first update, and fewer than `max_updates` (None: no limit) have happened.
    """

    use_loss: bool
    ema_teacher: bool
    ckpt: str | None
    it_load_ema_teacher: int
    rep_update: bool
    update_frequency: int
    it_first_update: int
    max_updates: int | None

    @classmethod
    def from_config(cls, gram: Any) -> "GramLifecycle":
        """From the `gram` section of a training configuration."""
        return cls(**{name: getattr(gram, name) for name in cls.__dataclass_fields__})

    @property
    def has_own_teacher(self) -> bool:
        """Whether a separate Gram teacher network exists."""
        return self.use_loss and not self.ema_teacher

    def loads_ema_before(self, iteration: int) -> bool:
        """Whether the EMA teacher is copied into the Gram teacher at the start of this iteration."""
        return self.has_own_teacher and iteration == self.it_load_ema_teacher

    def refreshes_after(self, iteration: int, n_updates: int) -> bool:
        """Whether the Gram teacher is refreshed at the end of this iteration, `n_updates` having happened before."""
        if not (self.has_own_teacher and self.rep_update):
            return False
        done = iteration + 1
        within_limit = self.max_updates is None or n_updates < self.max_updates
        return done >= self.it_first_update and done % self.update_frequency == 0 and within_limit

    def updates_before(self, iteration: int) -> int:
        """How many refreshes an uninterrupted run has done before this iteration starts."""
        if not (self.has_own_teacher and self.rep_update):
            return 0
        skipped = (max(self.it_first_update, 1) - 1) // self.update_frequency
        count = max(iteration // self.update_frequency - skipped, 0)
        return count if self.max_updates is None else min(count, self.max_updates)

    def initialized_before(self, iteration: int) -> bool:
        """Whether the Gram teacher of an uninterrupted run holds weights when this iteration starts."""
        loaded = 0 <= self.it_load_ema_teacher < iteration
        return self.ckpt is not None or loaded or self.updates_before(iteration) > 0


def resize_patch_features(
    patches: Tensor, grid: tuple[int, int], to: tuple[int, int], mode: str, antialias: bool
) -> Tensor:
    """Resize patch features from one patch grid to another.

    Args:
        patches: [B, h*w, D], row-major.
        grid: (h, w) of `patches`.
        to: (h', w') wanted.
        mode: interpolation mode of `torch.nn.functional.interpolate`.
        antialias: whether to smooth when shrinking.

    Returns:
        [B, h'*w', D]; `patches` itself if the grids are equal.
    """
    if grid == to:
        return patches
    maps = patches.transpose(1, 2).unflatten(2, grid)  # [B, D, h, w]
    maps = F.interpolate(maps, size=to, mode=mode, align_corners=False, antialias=antialias)
    return maps.flatten(2).transpose(1, 2)  # [B, h'*w', D]


def select_tokens(patches: Tensor, masks: Tensor, tokens_used: str) -> Tensor:
    """The patches that enter the Gram loss: all [B, P, D], or the masked or unmasked ones [n, D].

    Args:
        patches: [B, P, D].
        masks: [B, P] bool, True where the student saw the mask token.
        tokens_used: "all", "masked" or "unmasked".

    Raises:
        ValueError: another value of `tokens_used`.
    """
    if tokens_used == "all":
        return patches
    if tokens_used == "masked":
        return patches[masks]
    if tokens_used == "unmasked":
        return patches[~masks]
    raise ValueError(f"gram.tokens_used is {tokens_used!r}; expected 'all', 'masked' or 'unmasked'")


def square_or_crop_grid(n_patches: int, image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """The patch grid (h, w) of a crop of `image_size` pixels (height, width), checked against its number of patches."""
    height, width = image_size[0] // patch_size, image_size[1] // patch_size
    if height * width != n_patches:
        side = round(n_patches**0.5)
        if side * side != n_patches:
            raise ValueError(
                f"{n_patches} patches fit neither the crop size {image_size} with patch size {patch_size} nor a square"
            )
        height = width = side
    return height, width


def masked_and_unmasked_gram(
    loss: torch.nn.Module, student: Tensor, target: Tensor, masks: Tensor
) -> dict[str, Tensor]:
    """Statistics only, without gradient: the Gram loss over the masked and over the unmasked patches of the batch."""
    with torch.no_grad():
        return {
            f"stats_only/{used}_gram_loss": loss(
                select_tokens(student, masks, used), select_tokens(target, masks, used), img_level=False
            )
            for used in ("masked", "unmasked")
        }
