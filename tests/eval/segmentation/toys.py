"""Small segmentation data with exact labels, and a backbone that a few steps of training are enough for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.hub.registry import BACKBONES, BackboneEntry, Weights
from dinov3.models.vision_transformer import DinoVisionTransformer

TINY_VIT: dict[str, Any] = {
    "patch_size": 16,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "ffn_ratio": 2,
    "n_storage_tokens": 2,
    "layerscale_init": 1.0,  # far from the identity: random features tell colours apart
    "pos_embed_rope_dtype": "fp32",
}


def scene(seed: int, size: tuple[int, int] = (64, 96), classes: int = 4) -> tuple[Image.Image, np.ndarray]:
    """A noisy grey image of rectangles on a background, one pattern per class, and its classes, uint8 [H, W].

    Plain, lying stripes, standing stripes, a chessboard: distorted colours don't change which class it is.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    labels = np.full(size, rng.integers(classes), dtype=np.uint8)
    for _ in range(3):
        top, left = int(rng.integers(height - 16)), int(rng.integers(width - 16))
        bottom, right = top + int(rng.integers(16, height)), left + int(rng.integers(16, width))
        labels[top:bottom, left:right] = rng.integers(classes)
    y, x = np.mgrid[:height, :width] // 4 % 2
    patterns = np.stack([np.full(size, 0.5), y, x, (x + y) % 2])
    grey = 60 + 130 * np.take_along_axis(patterns, labels[None].astype(np.int64), 0)[0]
    noisy = grey[..., None] + rng.normal(0, 15, (*size, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), labels


def write_ade20k(root: Path, *, n_train: int = 6, n_val: int = 3, size: tuple[int, int] = (64, 96)) -> Path:
    """A data set in ADE20K's layout: labels count from 1, the first row of pixels is unlabelled."""
    for split, count, first in (("train", n_train, 0), ("val", n_val, 1000)):
        names = [f"{split}/{i:03d}.jpg" for i in range(count)]
        for i, name in enumerate(names):
            image, labels = scene(first + i, size)
            labels = labels + 1
            labels[0] = 0
            for folder, content, file in (
                ("images", image, name),
                ("annotations", Image.fromarray(labels), str(Path(name).with_suffix(".png"))),
            ):
                path = root / folder / file
                path.parent.mkdir(parents=True, exist_ok=True)
                content.save(path, **({"quality": 95} if folder == "images" else {}))
        (root / f"ADE20K_object150_{split}.txt").write_text("\n".join(names))
    return root


def tiny_backbone(seed: int = 0) -> DinoVisionTransformer:
    """A random backbone, in evaluation mode."""
    torch.manual_seed(seed)
    model = DinoVisionTransformer(**TINY_VIT)
    model.init_weights()
    return model.eval()


def register_tiny_backbone(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str = "dinov3_vit7b16") -> Path:
    """Let the hub's name stand for the tiny backbone, whose weights the returned file holds."""
    import dinov3.hub.backbones

    entry = BackboneEntry(name, {Weights.LVD1689M: "00000000"}, DinoVisionTransformer, TINY_VIT)
    monkeypatch.setitem(BACKBONES, name, entry)  # type: ignore[arg-type]
    path = folder / f"{name}.pth"
    torch.save(tiny_backbone().state_dict(), path)
    monkeypatch.setattr(dinov3.hub.backbones, name, lambda weights=path, **_: _loaded(name, weights), raising=False)
    return path


def _loaded(name: str, weights: Any) -> torch.nn.Module:
    from dinov3.hub.loading import load_backbone

    return load_backbone(name, weights=weights)


def small_arguments(root: Path, output_dir: Path, *more: str) -> list[str]:
    """Command-line arguments that make any of the published configurations tiny."""
    return [
        f"datasets.root={root}",
        f"--output-dir={output_dir}",
        "decoder_head.num_classes=4",
        "scheduler.total_iter=6",
        "num_workers=0",
        "transforms.train.img_size=64",
        "transforms.train.crop_size=[64,64]",
        "transforms.eval.img_size=64",
        "eval.crop_size=64",
        "eval.stride=43",
        "eval.eval_interval=4",
        "eval.n_pictures=1",
        *more,
    ]


M2F = (
    "decoder_head.type=m2f",
    "decoder_head.backbone_out_layers=FOUR_EVEN_INTERVALS",
    "decoder_head.hidden_dim=32",
    "scheduler.type=PolynomialLR",
    "scheduler.constructor_kwargs={}",
    "train.m2f.n_points=64",
    "bs=1",
)


def configuration(*arguments: str) -> Any:
    """The configuration object of command-line arguments."""
    from dinov3.eval.helpers import args_dict_to_dataclass, cli_parser
    from dinov3.eval.segmentation.config import SegmentationConfig

    values = cli_parser(arguments)
    values["config_file"] = values.pop("config", None)
    config, output_dir = args_dict_to_dataclass(
        {key: value for key, value in values.items() if value is not None}, SegmentationConfig, save_config=False
    )
    config.output_dir = output_dir
    return config
