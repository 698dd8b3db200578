"""Small depth models and data sets on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov3.eval.depth.config import DecoderConfig, DepthConfig
from dinov3.eval.depth.models import Depther, make_depther_from_config
from tests.helpers.backbones import tiny_vit

DPT = {"channels": 8, "post_process_channels": [8, 8, 8, 8], "n_hidden_channels": 8}


def tiny_depther(head: str = "linear", **options: Any) -> Depther:
    """A head of 16 bins from 0.5 to 10 m on a ViT of four blocks with patches of 16 pixels."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "min_depth": 0.5,
        "max_depth": 10.0,
        "type": head,
        "n_output_channels": 16,
        "backbone_out_layers": "FOUR_LAST",
        "head_kwargs": DPT if head == "dpt" else {},
    }
    return make_depther_from_config(tiny_vit(embed_dim=32, depth=4), DecoderConfig(**(settings | options)))


def tiny_config(output_dir: Path, **options: Any) -> DepthConfig:
    """A training of a few steps without a schedule."""
    config = DepthConfig(bs=2, num_workers=0, losses={"L1": 1.0}, output_dir=str(output_dir), **options)
    config.scheduler.type = "ConstantLR"
    config.scheduler.constructor_kwargs = {"factor": 1.0}
    config.scheduler.total_iter = 6
    config.optimizer.lr = 1e-2
    config.eval.eval_interval = 2
    config.eval.min_depth = 0.5
    return config


class Scenes(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Images whose brightness is their depth, 1 to 9 m; it changes smoothly from patch to patch of 16 pixels."""

    def __init__(self, n: int = 8, height: int = 32, width: int = 48) -> None:
        draws = torch.Generator().manual_seed(3)
        coarse = torch.rand(n, 1, height // 16, width // 16, generator=draws)
        fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
        texture = 0.1 * torch.randn(n, 3, height, width, generator=draws)
        self.images = (fine - 0.5) * 4 + texture
        self.depths = 1 + 8 * fine

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.depths[index]


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Random blocks, uint8 `[H, W, 3]`."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]


def write_nyu(root: Path, n_train: int = 4, n_val: int = 3, height: int = 48, width: int = 64) -> Path:
    """NYU's layout: lists, JPEG images, depth maps of 16 bits in millimetres with a hole each."""
    for split, n in (("train", n_train), ("test", n_val)):
        lines = []
        for i in range(n):
            folder = root / split
            folder.mkdir(parents=True, exist_ok=True)
            pixels = picture(i, height, width)
            depth = 1000 + 20 * pixels[..., 0].astype(np.uint16)
            depth[20:24, 20:24] = 0
            Image.fromarray(pixels).save(folder / f"rgb_{i}.jpg", quality=95)
            Image.fromarray(depth).save(folder / f"depth_{i}.png")
            lines.append(f"/{split}/rgb_{i}.jpg /{split}/depth_{i}.png 518.8579\n")
        (root / f"nyu_{split}.txt").write_text("".join(lines))
    return root
