r"""Explore page: one HTML file with pictures and their patch features inside, to be pointed at.

    python -m dinov3.run.explore photo.jpg folder/ --model dinov3_vits16 --weights vits16.pth
    python -m dinov3.run.explore folder/ --output runs/explore.html --config-file RUN/config.yaml \
        --weights RUN/teacher_checkpoint.pth

Pointing at a patch shows its cosine similarity to every other patch of every picture, as in the first figure of the
DINOv3 paper. No server and no network are needed; what the page does is in `explore.html` beside this file.
"""

import argparse
import base64
import io
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dinov3.data.datasets.decoders import UprightImageDataDecoder
from dinov3.eval.config import ModelConfig
from dinov3.eval.notebook_utils import picture_features
from dinov3.eval.prediction import collect_images
from dinov3.eval.setup import load_model_and_context
from dinov3.logging import cleanup_logging, setup_logging
from dinov3.models.backbone import Backbone
from dinov3.run.quickstart_figures import pca_colours

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger("dinov3")

_TEMPLATE = Path(str(files("dinov3.run").joinpath("explore.html")))
_SHOWN_SIDE = 480  # longer side of the pictures in the page [pixels]

_EXAMPLES = """examples:
  # the backbone that the quick start has trained
  python -m dinov3.run.explore photos/ --config-file runs/quickstart/training/config.yaml \\
      --weights runs/quickstart/training/teacher_checkpoint.pth
  # a released backbone
  python -m dinov3.run.explore a.jpg b.jpg --model dinov3_vits16 --weights dinov3_vits16_pretrain_lvd1689m.pth
"""


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m dinov3.run.explore",
        description="Write one HTML file in which patch features can be explored by pointing at them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, and folders of them")
    parser.add_argument("--output", type=Path, default=Path("explore.html"), help="default: %(default)s")
    parser.add_argument("--model", help="name of the backbone in the hub")
    parser.add_argument("--config-file", help="instead: configuration of the training that made the weights")
    parser.add_argument("--weights", help="file of weights; default: the released ones of the model")
    parser.add_argument("--image-size", type=int, default=384, help="height in pixels; default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Write the page; returns where it is.

    Raises:
        FileNotFoundError: no such image.
        ValueError: neither or both of `--model` and `--config-file`.
    """
    args = get_args_parser().parse_args(argv)
    setup_logging(level=logging.INFO)
    images = {
        name: UprightImageDataDecoder(file.read_bytes()).decode() for name, file in collect_images(args.images).items()
    }
    config = ModelConfig(config_file=args.config_file, pretrained_weights=args.weights, dino_hub=args.model)
    backbone, _ = load_model_and_context(config, output_dir="")
    page = render(backbone, images, args.image_size)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(page, encoding="utf-8")
    logger.info("%d pictures, %.1f MB: open %s", len(images), len(page) / 1e6, args.output.resolve())
    cleanup_logging()
    return cast(Path, args.output)


def render(backbone: nn.Module, images: Mapping[str, "Image.Image"], image_size: int = 384) -> str:
    """The page.

    Args:
        backbone: in evaluation mode.
        images: RGB pictures by name.
        image_size: height that pictures are resized to for the backbone [pixels].
    """
    features = {name: picture_features(backbone, image, image_size).cpu() for name, image in images.items()}
    patch_size = cast(Backbone, backbone).stride
    content = {
        "dim": next(iter(features.values())).shape[-1],
        "about": f"Pictures were {image_size} pixels high for the network, patches {patch_size} x {patch_size} pixels.",
        "pictures": [_picture(name, images[name], one) for name, one in features.items()],
    }
    text = json.dumps(content).replace("<", "\\u003c")  # a name must not end the script element
    return _TEMPLATE.read_text(encoding="utf-8").replace("$data", text, 1)


def quantise(features: Tensor) -> Tensor:
    """Features `[..., D]` in int8, each patch scaled to its largest component: cosines change by less than 0.01."""
    return (127 * features / features.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)).round().to(torch.int8)


def _picture(name: str, image: "Image.Image", features: Tensor) -> dict[str, Any]:
    shown = image.copy()
    shown.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    jpeg = io.BytesIO()
    shown.save(jpeg, format="JPEG", quality=88)
    colours = (255 * pca_colours(features.permute(2, 0, 1))).astype(np.uint8)
    return {
        "name": name,
        "width": shown.width,
        "height": shown.height,
        "rows": features.shape[0],
        "columns": features.shape[1],
        "jpeg": base64.b64encode(jpeg.getvalue()).decode(),
        "features": base64.b64encode(quantise(features).numpy().tobytes()).decode(),
        "pca": base64.b64encode(colours.tobytes()).decode(),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
