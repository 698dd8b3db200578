"""Features of large images: of the whole image at a lower resolution, and of windows at full resolution.

Source: DINOv3 (2025), appendix on object detection.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Windows go through the backbone together up to this many pixels: enough to fill a device, and at a patch of 16
# a batch of 16 k tokens.
MAX_PIXELS_AT_ONCE = 2**22

Span = tuple[int, int]


class WindowsWrapper(nn.Module):
    """A feature extractor on a grid of windows and on the whole image reduced to the size of a window.

    All that is in the canvas is seen, padding included: results of an image depend on the size of the canvas, that is,
    on the other images of its batch.

    Args:
        backbone: gives maps `[N, C, h, w]` of images `[N, 3, H, W]`; attributes `stride` and `num_channels`.
        n_windows: windows per side. Sides that are too short for so many get fewer.
        max_pixels: of windows that go through the backbone together; one window at least.
    """

    def __init__(self, backbone: nn.Module, n_windows: int, max_pixels: int = MAX_PIXELS_AT_ONCE) -> None:
        super().__init__()
        self._backbone = backbone
        self.n_windows, self.max_pixels = n_windows, max_pixels
        self.stride: int = backbone.stride  # type: ignore[assignment]
        self.num_channels: list[int] = [2 * channels for channels in backbone.num_channels]  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` (multiples of the stride) to `[B, 2 C, H / stride, W / stride]`, the whole image first."""
        rows, columns = (window_spans(side, self.n_windows, self.stride) for side in images.shape[-2:])
        windows = self._window_map(images, rows, columns)
        size = (rows[0][1] - rows[0][0], columns[0][1] - columns[0][0])
        reduced = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
        whole = self._backbone(reduced)
        whole = F.interpolate(whole, size=windows.shape[-2:], mode="bilinear", align_corners=False, antialias=True)
        return torch.cat([whole, windows], dim=1)

    def _window_map(self, images: Tensor, rows: list[Span], columns: list[Span]) -> Tensor:
        """The maps of all windows side by side; windows of equal size go through the backbone together."""
        by_size: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for i, (top, bottom) in enumerate(rows):
            for j, (left, right) in enumerate(columns):
                by_size.setdefault((bottom - top, right - left), []).append((i, j))
        maps: dict[tuple[int, int], Tensor] = {}
        for (height, width), places in by_size.items():
            n_at_once = len(places)
            if not torch.compiler.is_exporting():  # the batch of a graph is open
                n_at_once = max(1, self.max_pixels // (height * width * len(images)))
            for start in range(0, len(places), n_at_once):
                chunk = places[start : start + n_at_once]
                crops = [images[..., slice(*rows[i]), slice(*columns[j])] for i, j in chunk]
                maps |= zip(chunk, self._backbone(torch.cat(crops)).unflatten(0, (len(chunk), -1)), strict=True)
        lines = [torch.cat([maps[i, j] for j in range(len(columns))], dim=-1) for i in range(len(rows))]
        return torch.cat(lines, dim=-2)


def window_spans(side: int, n_windows: int, stride: int) -> list[Span]:
    """Where windows begin and end along one side.

    The first ones are ceil(floor(side / n) / stride) strides long, the last gets the rest. If there is no rest, n is
    lowered to the next number that leaves one.

    Args:
        side: of the canvas, a positive multiple of the stride [pixels].
        n_windows: n.
        stride: of the backbone [pixels].
    """
    for n in range(n_windows, 0, -1):
        length = -(-(side // n) // stride) * stride
        if side - (n - 1) * length > 0:
            return list(pairwise([*(length * i for i in range(n)), side]))
    raise ValueError(f"expected a side of at least one pixel and at least one window, got {side} and {n_windows}")
