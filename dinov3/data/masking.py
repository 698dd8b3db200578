"""Block masks over the patch grid, for the iBOT objective.

Owns how a mask of a requested size is drawn. How many masks a batch gets, and how large, is `collate.py`.
"""

import math
import operator
import random

import numpy as np

_TRIES_PER_BLOCK = 10


class MaskingGenerator:
    """Draws boolean masks made of random rectangles, with exactly the requested number of true entries.

    Rectangles are placed until the request is met or no further one fits; single patches drawn uniformly fill up the
    rest.

    Args:
        input_size: (height, width) of the patch grid, or one number for a square grid.
        num_masking_patches: largest number of patches a rectangle may add where `max_num_patches` is not given.
        min_num_patches: smallest area a rectangle is drawn with.
        max_num_patches: largest number of patches one rectangle may add; None means `num_masking_patches`, and if
            that is None too, the whole grid.
        min_aspect: smallest ratio height / width of a rectangle.
        max_aspect: largest ratio; None means 1 / `min_aspect`.

    Note:
        Draws come from the global generators of `random` and (legacy) `numpy.random`, unless a call is given its own.
        Their order is fixed, so equal states give the masks of the published training code.

    Source: BEiT (arXiv:2106.08254), Algorithm 1; iBOT (arXiv:2111.07832), section 3.3.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        num_masking_patches: int | None = None,
        min_num_patches: float = 4,
        max_num_patches: float | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ) -> None:
        height, width = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        self.height, self.width = operator.index(height), operator.index(width)
        if self.height < 1 or self.width < 1:
            raise ValueError(f"input_size must hold at least one patch, got {input_size!r}")
        if min_aspect <= 0 or (max_aspect is not None and max_aspect < min_aspect):
            raise ValueError(f"need 0 < min_aspect <= max_aspect, got {min_aspect} and {max_aspect}")
        self.num_patches = self.height * self.width
        self.num_masking_patches = num_masking_patches
        self.min_num_patches = min_num_patches
        if max_num_patches is None:
            max_num_patches = self.num_patches if num_masking_patches is None else num_masking_patches
        self.max_num_patches = max_num_patches
        self.log_aspect_ratio = (math.log(min_aspect), math.log(max_aspect or 1 / min_aspect))

    def __repr__(self) -> str:
        low, high = self.log_aspect_ratio
        return (
            f"{type(self).__name__}({self.height}, {self.width}, block area {self.min_num_patches} to "
            f"{self.max_num_patches}, log aspect {low:.3f} to {high:.3f})"
        )

    def get_shape(self) -> tuple[int, int]:
        """(height, width) of the masks."""
        return self.height, self.width

    def __call__(
        self,
        num_masking_patches: int = 0,
        *,
        python_rng: random.Random | None = None,
        numpy_rng: np.random.RandomState | None = None,
    ) -> np.ndarray:
        """Draw one mask.

        Args:
            num_masking_patches: number of true entries.
            python_rng, numpy_rng: generators to draw from; the global ones by default.

        Returns:
            bool array [height, width].

        Raises:
            ValueError: if the grid has fewer patches than asked for, or the number is negative.
        """
        count = operator.index(num_masking_patches)
        if not 0 <= count <= self.num_patches:
            raise ValueError(
                f"num_masking_patches must lie between 0 and {self.num_patches} "
                f"(a grid of {self.height} x {self.width}), got {count}"
            )
        # The module `random` is itself used as a generator: its functions are the methods of the global one.
        blocks_rng: random.Random = python_rng or random  # type: ignore[assignment]
        mask = np.zeros((self.height, self.width), dtype=bool)
        n_set = 0
        while n_set < count:
            added = self._place_block(mask, min(count - n_set, self.max_num_patches), blocks_rng)
            if added == 0:
                break
            n_set += added
        # Drawn on every call, also when nothing is missing: the state of the generator must not depend on the blocks.
        unset = np.flatnonzero(~mask)
        mask.flat[(numpy_rng or np.random).choice(unset, size=count - n_set, replace=False)] = True
        return mask

    def _place_block(self, mask: np.ndarray, limit: float, rng: random.Random) -> int:
        """Set one rectangle of at most `limit` unset entries in place; returns how many were added (0: none fitted)."""
        for _ in range(_TRIES_PER_BLOCK):
            area = rng.uniform(self.min_num_patches, limit)
            aspect = math.exp(rng.uniform(*self.log_aspect_ratio))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= self.height or w >= self.width:
                continue
            top, left = rng.randint(0, self.height - h), rng.randint(0, self.width - w)
            block = mask[top : top + h, left : left + w]
            new = block.size - int(np.count_nonzero(block))
            if 0 < new <= limit:
                block[...] = True
                return new
        return 0
