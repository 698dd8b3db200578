"""A small labelled data set that a network must look at to tell apart: patterns in random colours, sizes and places.

The classes survive cropping, zooming and flipping, so self-supervised training can find them.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 40  # pixels
PATTERNS = ("horizontal", "vertical", "diagonal", "checks", "rings", "dots")
N_CLASSES = len(PATTERNS)


def texture(label: int, number: int, seed: int = 0) -> Image.Image:
    """An image of a class."""
    rng = np.random.default_rng([seed, label, number])
    wave = _pattern(PATTERNS[label], rng)
    grey, contrast = rng.uniform(90, 165), rng.uniform(40, 80)
    tint = rng.uniform(-30, 30, 3)
    pixels = grey + tint + contrast * wave[..., None] + rng.normal(0, 15, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _pattern(name: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """Values from -1 to 1, [SIDE, SIDE]."""
    y, x = (
        2 * np.pi * rng.uniform(4, 7) * axis + rng.uniform(0, 2 * np.pi) for axis in np.mgrid[0:SIDE, 0:SIDE] / SIDE
    )
    if name == "horizontal":
        return np.sin(y)
    if name == "vertical":
        return np.sin(x)
    if name == "diagonal":
        return np.sin(x + y if rng.random() < 0.5 else x - y)
    if name == "checks":
        return np.sign(np.sin(x) * np.sin(y))
    if name == "rings":
        centre = rng.uniform(0.3, 0.7, 2) * SIDE
        rows, columns = np.mgrid[0:SIDE, 0:SIDE]
        return np.sin(np.hypot(rows - centre[0], columns - centre[1]) * rng.uniform(0.7, 1.2))
    return np.where(np.sin(x) * np.sin(y) > 0.5, 1.0, -1.0)


def write_textures(root: Path, per_class: int, seed: int) -> Path:
    """Write `root/<label>/<number>.png`."""
    for label in range(N_CLASSES):
        folder = root / str(label)
        folder.mkdir(parents=True)
        for number in range(per_class):
            texture(label, number, seed).save(folder / f"{number}.png")
    return root
