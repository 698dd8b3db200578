"""Small data sets and a model for the tests of the evaluations."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

COLOURS = {"blue": (40, 40, 190), "green": (40, 190, 40), "red": (190, 40, 40)}


class VectorDataset(Dataset[tuple[Tensor, Any]]):
    """Vectors around one centre per class, with labels known without loading."""

    def __init__(self, count: int, classes: int = 3, width: int = 6, seed: int = 0, spread: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.randint(classes, (count,), generator=generator)
        centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
        self.vectors = centres[self.targets] + torch.randn(count, width, generator=generator) * spread

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.vectors[index], int(self.targets[index])

    def get_target(self, index: int) -> int:
        return int(self.targets[index])


class MeanColour(nn.Module):
    """Features of an image: its mean colour. With a parameter, to have a device."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * self.scale

    def get_intermediate_layers(self, images: Tensor, n: int = 1, **_: Any) -> list[tuple[Tensor, Tensor]]:
        """(patch tokens, class token) of the last n layers, as backbones give them."""
        patches = nn.functional.adaptive_avg_pool2d(images, 2).flatten(2).transpose(1, 2) * self.scale
        return [(patches, self(images))] * n


def write_colour_folders(root: Path, per_class: int, seed: int = 0, size: int = 32) -> Path:
    """A folder of images per colour: noisy, but easy to tell apart."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.clip(rng.normal(colour, 40, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03d}.png")
    return root
