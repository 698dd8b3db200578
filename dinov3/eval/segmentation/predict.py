"""Predict classes with a trained segmentation head: `python -m dinov3.eval.segmentation.predict --help`."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from dinov3.checkpointer.heads import HeadFile
from dinov3.eval.prediction import predict_main
from dinov3.eval.segmentation.results import draw_segmentation
from dinov3.eval.segmentation.transforms import make_segmentation_eval_transforms
from dinov3.eval.segmentation.views import ViewAverager

if TYPE_CHECKING:
    from PIL.Image import Image

_DESCRIPTION = """Predict the class of every pixel.

Writes <name>.png, an image of class indices with a palette (16 bits where there are more than 256 classes), and
<name>_overlay.png, the image beside its prediction with the names of the classes.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, or 1 if no image could be read."""
    return predict_main(
        argv,
        task="segmentation",
        description=_DESCRIPTION,
        predict_one=predict_one,
        add_arguments=_add_arguments,
    )


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--img-size", type=int, help="length of the shorter side [pixels]; default: as in the training")
    parser.add_argument("--no-pictures", action="store_true", help="write class indices only")


def predict_one(model: nn.Module, image: "Image", path: Path, args: Namespace) -> None:
    """Write `<path>.png` and `<path>_overlay.png` for an image."""
    from PIL import Image

    from dinov3.eval.pictures import palette

    labels = predict_classes(model, image, img_size=args.img_size)
    names = _names(model)
    # Names may hold dots, so no suffix is replaced.
    target = path.with_name(f"{path.name}.png")
    if len(names) <= 256:
        indices = Image.frombytes("P", image.size, labels.astype(np.uint8).tobytes())
        indices.putpalette(palette(len(names)).tobytes())
        indices.save(target)
    else:
        Image.fromarray(labels.astype(np.uint16)).save(target)
    if not args.no_pictures:
        picture = path.with_name(f"{path.name}_overlay.png")
        draw_segmentation(picture, np.asarray(image), torch.from_numpy(labels), names)


def predict_classes(model: nn.Module, image: "Image", *, img_size: Any = None) -> np.ndarray:
    """The class of every pixel of an image, int64 [H, W].

    Args:
        model: from `dinov3.hub.load_head`.
        image: RGB.
        img_size: length that the shorter side is resized to [pixels]; None: as in the training's evaluations.
    """
    head_file = cast(HeadFile, model.head_file)
    decoder, inference = head_file.config["decoder"], head_file.config["inference"]
    transform = make_segmentation_eval_transforms(
        img_size=inference["img_size"] if img_size is None else img_size,
        inference_mode="slide",
        mean=[255 * value for value in head_file.mean],
        std=[255 * value for value in head_file.std],
    )
    views, _ = transform(image, np.zeros((image.height, image.width), dtype=np.uint8))
    scores_of = ViewAverager(
        cast(Any, model),
        next(model.parameters()).device,
        decoder["decoder_type"],
        decoder["num_classes"],
        mode=inference["mode"],
        crop_size=inference["crop_size"],
        stride=inference["stride"],
    )
    scores = scores_of([view[None] for view in views], (image.height, image.width))
    return scores.argmax(1)[0].cpu().numpy()


def _names(model: nn.Module) -> list[str]:
    head_file = cast(HeadFile, model.head_file)
    return head_file.class_names or [str(i) for i in range(head_file.config["decoder"]["num_classes"])]


if __name__ == "__main__":
    sys.exit(main())
