"""Depth maps of pictures, by a head that you trained: `python -m dinov3.eval.depth.predict --help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from dinov3.checkpointer.heads import HeadFile
from dinov3.eval.depth.inference import make_inference
from dinov3.eval.depth.results import METRIC_COLOURS
from dinov3.eval.depth.transforms import as_image
from dinov3.eval.pictures import ColourBar, as_picture, colour_values, save_panels
from dinov3.eval.prediction import predict_main

if TYPE_CHECKING:
    from PIL.Image import Image

_DESCRIPTION = """Predict depth in metres. For each image: <name>_depth.npy (float32 [H, W], metres) and
<name>_depth.png, the image beside its depth in colours with a scale."""


def predict_one(model: nn.Module, image: "Image", path: Path, args: argparse.Namespace) -> None:
    """Write depth map and picture of one image.

    Args:
        model: of `load_head`.
        image: RGB.
        path: of the files, without extension.
        args: `size` and `tta` are read.
    """
    depth = predict_depth(model, image, size=args.size, use_tta=args.tta)
    np.save(path.with_name(f"{path.name}_depth.npy"), depth)
    low, high = float(depth.min()), float(depth.max())
    panels = {"image": as_picture(image), "depth": colour_values(depth, low, high, METRIC_COLOURS)}
    bar = ColourBar(low, high, "depth [m]", METRIC_COLOURS)
    save_panels(path.with_name(f"{path.name}_depth.png"), panels, colour_bar=bar)


def predict_depth(
    model: nn.Module, image: "Image", *, size: int | Sequence[int] | None = None, use_tta: bool = False
) -> Any:
    """Depth [metres] of a picture: float32 array `[H, W]`, within the range that the head was trained for.

    Args:
        model: of `load_head`.
        image: RGB, any size.
        size: length that the shorter side is scaled to for the prediction [pixels]; None: none.
        use_tta: average over the image and its mirror image.
    """
    head_file = cast(HeadFile, model.head_file)
    device = next(model.parameters()).device
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (head_file.mean, head_file.std))
    pixels = as_image(image).as_subclass(torch.Tensor).to(device)
    depth_range = (head_file.config["min_depth"], head_file.config["max_depth"])
    depth = make_inference(model, ((pixels - mean) / std)[None], size=size, use_tta=use_tta, depth_range=depth_range)
    return depth[0, 0].float().cpu().numpy()


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", type=int, help="scale images to this shorter side first [pixels]; default: as they are"
    )
    parser.add_argument("--tta", action="store_true", help="average over each image and its mirror image")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0; 1 if no image could be read."""
    return predict_main(
        argv, task="depth", description=_DESCRIPTION, predict_one=predict_one, add_arguments=_add_arguments
    )


if __name__ == "__main__":
    sys.exit(main())
