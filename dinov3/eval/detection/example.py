"""A detector trained in minutes on a CPU, on data made here: photographed things on photographed ground, exact boxes.

    python -m dinov3.eval.detection.example --output-dir runs/detection-example

Things are round cut-outs of photographs that packages bring along, on crops of others. The training is that of `run.py`
on the backbone of the quick start if `runs/quickstart` is there (`make quickstart`), else on one with random weights;
what such a network can tell apart is colour and texture, which is enough for these things. Written are the data set in
COCO's form (`data/`) and what `run.py` writes: the head, COCO's figures, pictures of objects and detections.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from dinov3.data.photos import open_photo, photo_or_other
from dinov3.eval.example_backbone import quickstart_backbone, write_random_backbone

IMAGE_PX = 128
THINGS = ("cat", "coffee", "coins", "flower", "retina")
GROUNDS = ("brick", "china", "grass", "gravel")
_THING_PX = (32, 72)  # smallest and largest diameter
_MAX_COVERED = 0.3  # of a thing, by those pasted later
_PHOTO_PX = 192  # shorter side of the photographs


class Box(NamedTuple):
    """Left, top, width and height in pixels."""

    left: int
    top: int
    width: int
    height: int


def make_example(root: Path, n_train: int = 200, n_val: int = 24, seed: int = 0) -> dict[str, str]:
    """Write the data set, unless it is there, and return the dataset strings of its splits.

    Args:
        root: gets `<split>/<n>.png` and `annotations/instances_<split>.json`.
        n_train, n_val: numbers of images.
        seed: of the images.

    Raises:
        FileNotFoundError: no photographs on this machine.
    """
    counts = {"train": n_train, "val": n_val}
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for number, (split, n) in enumerate(counts.items()):
        annotations = root / "annotations" / f"instances_{split}.json"
        if annotations.is_file() and len(json.loads(annotations.read_text())["images"]) == n:
            continue
        (root / split).mkdir(exist_ok=True)
        objects = []
        for i in range(n):
            picture, things = compose(np.random.default_rng([seed, number, i]))
            picture.save(root / split / f"{i:04d}.png")
            objects += [(i, name, box) for name, box in things]
        annotations.write_text(json.dumps(_instances(n, objects)))
    return {split: f'CocoDetection:split={split}:root="{root}"' for split in counts}


def compose(rng: np.random.Generator) -> tuple[Image.Image, list[tuple[str, Box]]]:
    """One image of 128 x 128 pixels, and the names and boxes of the things in it."""
    ground = _photo(str(rng.choice(GROUNDS)))
    left, top = (int(rng.integers(0, side - IMAGE_PX + 1)) for side in ground.size)
    picture = ground.crop((left, top, left + IMAGE_PX, top + IMAGE_PX))
    placed: list[tuple[str, Box]] = []
    for _ in range(int(rng.integers(1, 5))):
        side = int(rng.integers(*_THING_PX))
        box = Box(int(rng.integers(0, IMAGE_PX - side)), int(rng.integers(0, IMAGE_PX - side)), side, side)
        if any(_covered(other, box) > _MAX_COVERED for _, other in placed):
            continue
        name = str(rng.choice(THINGS))
        _paste(rng, picture, name, box)
        placed.append((name, box))
    return picture, placed


def _paste(rng: np.random.Generator, picture: Image.Image, name: str, box: Box) -> None:
    photo = _photo(name)
    side = int(min(photo.size) * rng.uniform(0.6, 1.0))
    left, top = ((length - side) // 2 for length in photo.size)
    cut = photo.crop((left, top, left + side, top + side)).resize((box.width, box.height), Image.Resampling.LANCZOS)
    mask = Image.new("L", (4 * box.width, 4 * box.height))
    ImageDraw.Draw(mask).ellipse((0, 0, 4 * box.width - 1, 4 * box.height - 1), fill=255)
    picture.paste(cut, (box.left, box.top), mask.resize(cut.size, Image.Resampling.LANCZOS))


def _covered(below: Box, above: Box) -> float:
    """Part of a box that another covers."""
    width = min(below.left + below.width, above.left + above.width) - max(below.left, above.left)
    height = min(below.top + below.height, above.top + above.height) - max(below.top, above.top)
    return max(width, 0) * max(height, 0) / (below.width * below.height)


def _instances(n_images: int, objects: Sequence[tuple[int, str, Box]]) -> dict[str, object]:
    """The content of a JSON file in COCO's form."""
    size = {"height": IMAGE_PX, "width": IMAGE_PX}
    return {
        "images": [{"id": i, "file_name": f"{i:04d}.png", **size} for i in range(n_images)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(THINGS, start=1)],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": THINGS.index(name) + 1,
                "bbox": list(box),
                "area": box.width * box.height,
                "iscrowd": 0,
            }
            for number, (image, name, box) in enumerate(objects, start=1)
        ],
    }


_photos: dict[str, Image.Image] = {}


def _photo(name: str) -> Image.Image:
    """A photograph; where it is missing, another one in its place."""
    if name not in _photos:
        _photos[name] = open_photo(photo_or_other(name, (THINGS + GROUNDS).index(name)), short_side=_PHOTO_PX)
    return _photos[name]


# --- The training ----------------------------------------------------------------------------------------------------


def example_arguments(output_dir: Path, strings: dict[str, str], model: Sequence[str], epochs: float) -> list[str]:
    """What `run.py` is called with."""
    head = {
        "hidden_dim": 64,
        "nheads": 4,
        "dim_feedforward": 128,
        "encoder_dropout": 0.0,
        "num_encoder_layers": 2,
        "dec_layers": 3,
        "decoder_rpe_hidden_dim": 32,
        "num_queries_one2one": 30,
        "num_queries_one2many": 60,
        "k_one2many": 4,
        "proposal_min_size": 24,
        "topk": 50,
    }
    return [
        f"output_dir={output_dir}",
        *model,
        f"datasets.train={strings['train']}",
        f"datasets.val={strings['val']}",
        *(f"head.{name}={value}" for name, value in head.items()),
        "bs=4",
        "num_workers=0",
        f"scheduler={{epochs: {epochs}, warmup_iters: 20, milestones: [{0.8 * epochs}]}}",
        "optimizer.lr=1e-3",
        "losses.cls_loss=ia_bce",  # scores tell good boxes from bad ones sooner than with the focal loss
        "transforms.train={short_side: [112, 144], max_size: null, min_area: 0.8}",
        f"transforms.eval={{short_side: {IMAGE_PX}, max_size: null}}",
    ]


write_backbone = partial(write_random_backbone, patch_size=8)


def _default_backbone(folder: Path) -> list[str]:
    """Arguments for the backbone of the quick start; without one, for a small random one, whose weights are kept."""
    if (found := quickstart_backbone()) is not None:
        return found
    config, weights = write_backbone(folder)
    return [f"model.config_file={config}", f"model.pretrained_weights={weights}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Make the data, train and test a head, write pictures. Returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m dinov3.eval.detection.example", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--output-dir", default="runs/detection-example")
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--images", type=int, default=200, help="number of training images")
    args, rest = parser.parse_known_args(argv)
    output_dir = Path(args.output_dir)
    strings = make_example(output_dir / "data", n_train=args.images)
    model = [] if any(option.startswith("model.") for option in rest) else _default_backbone(output_dir)

    from dinov3.eval.detection import run

    return run.main([*example_arguments(output_dir, strings, model, args.epochs), *rest])


if __name__ == "__main__":
    sys.exit(main())
