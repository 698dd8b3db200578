"""Which pixels of a depth map count."""

from enum import Enum

import torch
from torch import Tensor


class EvalCrop(Enum):
    """Parts of the image that published evaluations look at: rows (from, to) and columns (from, to), as fractions."""

    FULL = ((0.0, 1.0), (0.0, 1.0))
    NYU_EIGEN = ((45 / 480, 471 / 480), (41 / 640, 601 / 640))
    """Of NYU Depth v2, Eigen et al. (2014)."""
    KITTI_EIGEN = ((0.3324324, 0.91351351), (0.0359477, 0.96405229))
    """Of KITTI, Eigen et al. (2014)."""
    GARG = ((0.40810811, 0.99189189), (0.03594771, 0.96405229))
    """Of KITTI, Garg et al. (2016)."""


def parse_eval_crop(name: str | EvalCrop) -> EvalCrop:
    """The crop of that name.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(name, EvalCrop):
        return name
    if name.upper() not in EvalCrop.__members__:
        raise ValueError(f"unknown eval_mask {name!r}; known: {', '.join(EvalCrop.__members__)}")
    return EvalCrop[name.upper()]


def make_valid_mask(depth: Tensor, eval_crop: str | EvalCrop = EvalCrop.FULL, ignored_value: float = 0.0) -> Tensor:
    """Booleans in the shape of `depth` `[B, 1, H, W]`: true inside the crop where depth is not `ignored_value`.

    Args:
        depth: true depth.
        eval_crop: name of the crop; its borders are cut off to whole pixels.
        ignored_value: marks pixels without a true depth. Those that are not finite don't count either.

    Raises:
        ValueError: unknown crop.
    """
    rows, columns = parse_eval_crop(eval_crop).value
    height, width = depth.shape[-2:]
    inside = torch.zeros(depth.shape, dtype=torch.bool, device=depth.device)
    inside[..., _pixels(rows, height), _pixels(columns, width)] = True
    return inside & (depth != ignored_value) & torch.isfinite(depth)


def _pixels(part: tuple[float, float], size: int) -> slice:
    return slice(int(part[0] * size), int(part[1] * size))
