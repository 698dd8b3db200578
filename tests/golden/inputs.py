"""Inputs of the area `data_evals`, by the rules of its manifest (`input_rules`, `toy_dataset`)."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.vision import StandardTransform

from tests.golden import fill


def image(name: str, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: random blocks of 8 pixels with noise."""
    blocks = fill.tensor(f"{name}/blocks", (-(-height // 8), -(-width // 8), 3), 50, 127).numpy()
    blocks = blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    noise = fill.tensor(f"{name}/noise", (height, width, 3), 8).numpy()
    return np.clip(blocks + noise, 0, 255).astype(np.uint8)


def pil_image(name: str, height: int, width: int) -> Image.Image:
    """The same as a PIL image."""
    return Image.fromarray(image(name, height, width))


def labels(name: str, count: int, classes: int) -> torch.Tensor:
    """int64 [count] below `classes`."""
    return (fill.tensor(name, (count,)).abs() * 1000).to(torch.int64) % classes


def write_png(path: Path, pixels: np.ndarray) -> None:
    """PNG data under any file name, parents made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(pixels))


def png_bytes(pixels: np.ndarray) -> bytes:
    """Lossless encoding of the pixels."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


class ToyDataset(torch.utils.data.Dataset[tuple[Any, Any]]):
    """The manifest's toy dataset: every class has a tint of its own."""

    def __init__(
        self,
        name: str,
        count: int,
        classes: int,
        height: int = 8,
        width: int = 8,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        self._name, self._size = name, (height, width)
        self._targets = labels(f"{name}/labels", count, classes).tolist()
        self.transform, self.target_transform = transform, target_transform
        self.transforms = StandardTransform(transform, target_transform)

    def __len__(self) -> int:
        return len(self._targets)

    def get_target(self, index: int) -> int:
        """Class of an item."""
        return self._targets[index]

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        target = self._targets[index]
        tint = fill.tensor(f"toy-class/{target}", (3,), 40).numpy()
        pixels = image(f"{self._name}/{index}", *self._size) * 0.5 + 64 + tint
        return self.transforms(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), target)


def multi_hot(name: str, count: int, classes: int, rate: float = 0.0) -> torch.Tensor:
    """int64 [count, classes] of zeros and ones."""
    return (fill.tensor(name, (count, classes)) > rate).to(torch.int64)


def clustered(name: str, count: int, dim: int, classes: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [count, dim] around one centre per class, and their classes [count]."""
    y = labels(f"{name}/labels", count, classes)
    centres = fill.tensor(f"{name}/centres", (classes, dim))
    return centres[y] + fill.tensor(f"{name}/noise", (count, dim), spread), y


class ToyModel(torch.nn.Module):
    """The manifest's toy backbone: features of the image averaged to `grid` x `grid` pixels."""

    def __init__(self, dim: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(3 * grid * grid, dim) for _ in range(2))
        self.patch = torch.nn.Linear(3, dim)
        fill.fill(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self._pooled(x).flatten(1))

    def get_intermediate_layers(self, x: torch.Tensor, n: int = 1, **_: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(patch tokens, class token) of the last n layers."""
        pooled = self._pooled(x)
        patches = self.patch(pooled.flatten(2).transpose(1, 2))
        return [((i + 1) * patches, block(pooled.flatten(1))) for i, block in enumerate(self.blocks)][-n:]

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, self.grid)
