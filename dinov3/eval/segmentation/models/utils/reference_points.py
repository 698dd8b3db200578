"""Points that deformable attention counts its offsets from."""

from collections.abc import Sequence

import torch
from torch import Tensor


def cell_centres(sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Centres (x, y) of the cells of grids of (H, W) cells, row by row and grid by grid, from 0 to 1 over each grid.

    Returns:
        float32 `[1, S, 1, 2]`: the same for all images and for all levels that are read.
    """
    grids = []
    for height, width in sizes:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        grids.append(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1).flatten(0, 1))
    return torch.cat(grids)[None, :, None]
