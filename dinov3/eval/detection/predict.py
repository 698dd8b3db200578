"""Boxes of a trained head on images of your own: `python -m dinov3.eval.detection.predict --help`."""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from dinov3.checkpointer.heads import HeadFile
from dinov3.eval.detection.inference import Views, detect, soft_nms
from dinov3.eval.detection.models.detr import PlainDETR
from dinov3.eval.detection.models.processor import above
from dinov3.eval.pictures import as_picture, draw_boxes, palette
from dinov3.eval.prediction import predict_main

_DESCRIPTION = (
    "Detect objects with a trained head. Written for each image: <name>.json, a list of {label, name, score, "
    "box: [left, top, right, bottom] in pixels}, the best first; and <name>.png, the image with boxes, names "
    "and scores."
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; 1 if no image could be read."""
    return predict_main(
        argv, task="detection", description=_DESCRIPTION, predict_one=predict_one, add_arguments=_add_arguments
    )


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--score-threshold", type=float, default=0.3, help="leave out detections below (default 0.3)")
    parser.add_argument("--keep-doubles", action="store_true", help="no soft-NMS of boxes that lie upon better ones")
    parser.add_argument("--short-side", type=int, help="shorter side of images [pixels]; default: as in the training")


def predict_one(model: nn.Module, image: Any, path: Path, args: Namespace) -> None:
    """Write the files of one image; see the description."""
    found = detect_image(
        model,
        image,
        score_threshold=args.score_threshold,
        short_side=args.short_side,
        keep_doubles=args.keep_doubles,
    )
    path.with_name(path.name + ".json").write_text(json.dumps(found, indent=1))
    picture = draw_objects(as_picture(image), found)
    from PIL import Image

    Image.fromarray(picture).save(path.with_name(path.name + ".png"))


def detect_image(
    model: nn.Module,
    image: Any,
    *,
    score_threshold: float = 0.3,
    short_side: int | None = None,
    keep_doubles: bool = False,
) -> list[dict[str, Any]]:
    """What a detector of `dinov3.hub.load_head` finds in an image.

    Args:
        model: the detector; its `head_file` says how images are prepared.
        image: RGB, PIL, or a uint8 tensor `[3, H, W]`.
        score_threshold: leave out detections below it.
        short_side: of the image as the detector sees it [pixels]; None: as in the training.
        keep_doubles: leave scores as they are; otherwise soft-NMS lowers those of boxes that lie upon better ones of
            the same class: a head that was trained for long does so by itself.

    Returns:
        `{"label": class, "name": text, "score": number, "box": [left, top, right, bottom] in pixels of the image}`, the
        best first.
    """
    head_file, detector = cast(HeadFile, model.head_file), cast(PlainDETR, model.detector)
    side = short_side or head_file.config["short_side"]
    views = Views([side], head_file.config["max_size"], detector.backbone.stride, head_file.mean, head_file.std)
    size = (image.shape[-2], image.shape[-1]) if isinstance(image, Tensor) else (image.height, image.width)
    device = next(model.parameters()).device
    found = detect(model, views(image), size, device)
    if not keep_doubles:
        found = soft_nms(found, topk=len(found["scores"]))
    found = above(found, score_threshold)
    names = head_file.class_names or []
    return [
        {"label": label, "name": names[label] if label < len(names) else str(label), "score": score, "box": box}
        for score, label, box in zip(*(found[key].tolist() for key in ("scores", "labels", "boxes")), strict=True)
    ]


def draw_objects(picture: Any, found: Sequence[Mapping[str, Any]]) -> Any:
    """An image uint8 `[H, W, 3]` with what `detect_image` found in it."""
    colours = palette(max([one["label"] for one in found], default=0) + 1).tolist()
    return draw_boxes(
        picture,
        [one["box"] for one in found],
        [f"{one['name']} {one['score']:.2f}" for one in found],
        [colours[one["label"]] for one in found],
    )


if __name__ == "__main__":
    sys.exit(main())
