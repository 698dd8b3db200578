"""Axial rotary position encoding of a patch grid: the tables of sines and cosines, and the rotation by them."""

import math

import torch
from torch import Tensor, nn

RopeTables = tuple[Tensor, Tensor]

# Tables of this many grids are kept. A training run sees a handful of grids; an evaluation at native image sizes sees
# very many, each of up to tens of megabytes.
_MAX_CACHED = 8


class RopePositionEmbedding(nn.Module):
    """Tables of sines and cosines for a grid of patches, whose coordinates span [-1, 1].

    Half of each head's frequencies turn with the row, half with the column. The buffer `periods` is what counts:
    values loaded from a state dict are used as they are.

    Source: Su et al., RoFormer (2021); axial form with random shift, jitter and rescaling: DINOv3 (2025), section 3.2.
    """

    periods: Tensor

    def __init__(
        self,
        embed_dim: int,
        *,
        num_heads: int,
        base: float | None = 100.0,
        min_period: float | None = None,
        max_period: float | None = None,
        normalize_coords: str = "separate",
        shift_coords: float | None = None,
        jitter_coords: float | None = None,
        rescale_coords: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Set up the periods, either from `base` or from `min_period` to `max_period` (then with `base=None`).

        Args:
            embed_dim: width D of the tokens; D / num_heads must be a multiple of 4.
            num_heads: attention heads.
            base: periods are base^(2i / (d / 2)), i = 0 ... d/4 - 1.
            min_period: shortest period, in units of half the grid.
            max_period: longest period.
            normalize_coords: "min", "max", "separate": coordinates over the shorter side, the longer, or each its own.
            shift_coords: training only: shift each axis by U(-s, s).
            jitter_coords: training only: scale each axis by a log-uniform factor in [1 / j, j].
            rescale_coords: training only: scale both axes by one log-uniform factor in [1 / r, r].
            dtype: of the whole computation and the tables, default torch's default dtype. In bfloat16 the roundings
                along the way are part of the definition, released recipes were trained so.
            device: of the buffer.

        Raises:
            ValueError: a head width that is no multiple of 4, both or neither kind of periods, an unknown
                `normalize_coords`.
        """
        super().__init__()
        if embed_dim % (4 * num_heads) != 0:
            raise ValueError(f"embed_dim ({embed_dim}) must be a multiple of 4 * num_heads ({4 * num_heads})")
        both_periods = min_period is not None and max_period is not None
        if (base is None) != both_periods or (min_period is None) != (max_period is None):
            raise ValueError(
                "give either base, or min_period and max_period with base=None; got "
                f"base={base}, min_period={min_period}, max_period={max_period}"
            )
        if normalize_coords not in ("min", "max", "separate"):
            raise ValueError(f"normalize_coords is 'min', 'max' or 'separate', got {normalize_coords!r}")
        self.base = base
        self.min_period = min_period
        self.max_period = max_period
        self.D_head = embed_dim // num_heads
        self.normalize_coords = normalize_coords
        self.shift_coords = shift_coords
        self.jitter_coords = jitter_coords
        self.rescale_coords = rescale_coords
        self.dtype = dtype or torch.get_default_dtype()
        self.register_buffer("periods", torch.empty(self.D_head // 4, device=device, dtype=self.dtype))
        self.reset_parameters()
        self._cache: dict[tuple[int, int, int], RopeTables] = {}
        self._cached_periods: Tensor | None = None
        self._cached_version = -1

    def reset_parameters(self) -> None:
        """Recompute the periods from the constructor's arguments, each step rounded to the dtype."""
        n_periods, device = self.D_head // 4, self.periods.device
        if self.base is not None:
            steps = torch.arange(n_periods, device=device, dtype=self.dtype)
            periods = self.base ** (2 * steps / (self.D_head // 2))
        else:
            assert self.min_period is not None  # checked at construction, as is the other
            assert self.max_period is not None
            ratio = self.max_period / self.min_period
            exponents = torch.linspace(0, 1, n_periods, device=device, dtype=self.dtype)
            periods = ratio**exponents / ratio * self.max_period
        with torch.no_grad():
            self.periods.copy_(periods)

    @property
    def is_random(self) -> bool:
        """Whether each call draws another table: training mode, with an augmentation of the coordinates."""
        augmented = (self.shift_coords, self.jitter_coords, self.rescale_coords) != (None, None, None)
        return self.training and augmented

    def forward(self, *, H: int, W: int, n_prefix: int = 0) -> RopeTables:
        """Sine and cosine tables, each `[n_prefix + H * W, D / num_heads]`, patches row by row.

        Args:
            H: rows of patches.
            W: columns of patches.
            n_prefix: rows put before the patches that leave their token as it is (sine 0, cosine 1).

        Note: random draws in training mode, in this order: shift (2 values: row, column), jitter (2), rescale (1).
            Tables without random parts are kept until `periods` changes.
        """
        if self.is_random or is_traced() or self.periods.is_inference():
            return self._compute(H, W, n_prefix)
        if self._cached_periods is not self.periods or self._cached_version != self.periods._version:
            self._cache = {}  # loaded, moved or changed in place
            self._cached_periods, self._cached_version = self.periods, self.periods._version
        key = (H, W, n_prefix)
        if key not in self._cache:
            if len(self._cache) >= _MAX_CACHED:
                self._cache = {}
            # Tables made under inference mode could not take part in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                self._cache[key] = self._compute(H, W, n_prefix)
        return self._cache[key]

    def _compute(self, H: int, W: int, n_prefix: int) -> RopeTables:
        coordinates = self._coordinates(H, W)
        if self.is_random:
            coordinates = self._augment(coordinates)
        angles = (2 * math.pi * coordinates[:, :, None]) / self.periods.to(self.dtype)  # [H * W, 2, d / 4]
        angles = angles.flatten(1).tile(2)  # [H * W, d]
        sin, cos = angles.sin(), angles.cos()
        if n_prefix:
            sin = torch.cat([sin.new_zeros(n_prefix, self.D_head), sin])
            cos = torch.cat([cos.new_ones(n_prefix, self.D_head), cos])
        return sin, cos

    def _coordinates(self, H: int, W: int) -> Tensor:
        """Centres of the patches (row, column) in [-1, 1], `[H * W, 2]`."""
        device, dtype = self.periods.device, self.dtype
        extent = {"max": (max(H, W),) * 2, "min": (min(H, W),) * 2, "separate": (H, W)}[self.normalize_coords]
        rows = torch.arange(0.5, H, device=device, dtype=dtype) / extent[0]
        columns = torch.arange(0.5, W, device=device, dtype=dtype) / extent[1]
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        return 2.0 * grid.flatten(0, 1) - 1.0

    def _augment(self, coordinates: Tensor) -> Tensor:
        if self.shift_coords is not None:
            coordinates = coordinates + self._uniform(2, self.shift_coords)
        if self.jitter_coords is not None:
            coordinates = coordinates * self._uniform(2, math.log(self.jitter_coords)).exp()
        if self.rescale_coords is not None:
            coordinates = coordinates * self._uniform(1, math.log(self.rescale_coords)).exp()
        return coordinates

    def _uniform(self, n: int, bound: float) -> Tensor:
        return torch.empty(n, device=self.periods.device, dtype=self.dtype).uniform_(-bound, bound)


def rotate(x: Tensor, tables: RopeTables) -> Tensor:
    """`x * cos + rot(x) * sin` with `rot([a, b]) = [-b, a]` on the two halves of the last axis.

    Args:
        x: `[..., d]`.
        tables: sine and cosine, of shapes that broadcast with x. A narrower dtype than that of x rounds x to it first.

    Returns:
        The rotated x, in the wider dtype of the (rounded) x and the tables.
    """
    sin, cos = tables
    if torch.promote_types(x.dtype, sin.dtype) != sin.dtype:
        x = x.to(sin.dtype)
    (a, b), (sin_a, sin_b) = x.chunk(2, -1), sin.chunk(2, -1)
    if _may_write(x, sin, cos):
        out = x * cos
        out_a, out_b = out.chunk(2, -1)
        if sin.dtype in (torch.bfloat16, torch.float16):  # each product is rounded, which is part of their definition
            out_a.sub_(b * sin_a)
            out_b.add_(a * sin_b)
        else:
            out_a.addcmul_(b, sin_a, value=-1)
            out_b.addcmul_(a, sin_b)
        return out
    cos_a, cos_b = cos.chunk(2, -1)
    return torch.cat([a * cos_a - b * sin_a, b * cos_b + a * sin_b], dim=-1)


def _may_write(x: Tensor, sin: Tensor, cos: Tensor) -> bool:
    """Whether to rotate in place, with half the memory traffic: outside autograd and compilation."""
    if is_traced():
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or sin.requires_grad or cos.requires_grad))


def is_traced() -> bool:
    """Whether this call is recorded (compiled, exported, traced): its graph must not depend on what ran before."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
