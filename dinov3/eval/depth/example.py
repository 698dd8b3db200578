"""A depth data set whose truth is exact, made of real photographs on this machine, and a head trained on it.

    python -m dinov3.eval.depth.example --output-dir runs/depth-example

Scenes are rooms seen by a pinhole camera: floor, ceiling, side walls and back wall covered with photographed textures,
in perspective, and cut-outs of photographs standing on the floor, all of it in haze. Depth follows from the geometry.
The training is that of `run.py`, on a small backbone with random weights unless others are named. `report.md` compares
the head with one depth for all pixels, and with the usual depth of each place in the image.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dinov3.data.photos import open_photo, photo_or_other
from dinov3.eval.example_backbone import write_random_backbone

logger = logging.getLogger("dinov3")

HEIGHT, WIDTH = 96, 128
N_TEST = 16
_FOCAL = 110.0  # pixels
_TEXTURES = ("brick", "grass", "gravel", "china", "flower", "coffee")
_FIGURES = ("cat", "astronaut", "coffee", "flower", "rocket")
_TEXTURE_PX = 256
_MILLIMETRES = 1000
_PIXELS_PER_METRE = 80.0  # of textures
_HAZE = (205.0, 215.0, 225.0)  # its colour
_VISIBILITY = 5.0  # metres, after which 1/e of the light of things is left
_RANGE = (0.5, 10.0)  # metres
_REPORTED = ("abs_rel", "rmse", "a1")
REPORT = "report.md"


class Room(NamedTuple):
    """Sizes in metres: of the camera above the floor, of ceiling, side walls and back wall from the camera."""

    camera: float
    ceiling: float
    side: float
    back: float


def make_example(root: Path, n_train: int = 200, n_test: int = N_TEST, seed: int = 0) -> dict[str, str]:
    """Write the data set, unless it is there, and return the dataset strings of its splits.

    Args:
        root: gets `images/<split>/<n>.png` and `depth/<split>/<n>.png` (16 bits, millimetres).
        n_train, n_test: number of scenes.
        seed: of the scenes.

    Raises:
        FileNotFoundError: no photographs on this machine.
    """
    from PIL import Image

    counts = {"train": n_train, "test": n_test}
    for number, (split, n) in enumerate(counts.items()):
        for kind in ("images", "depth"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            target = root / "depth" / split / f"{i:04d}.png"
            if target.is_file():
                continue
            image, depth = compose(np.random.default_rng([seed, number, i]))
            Image.fromarray(image).save(root / "images" / split / f"{i:04d}.png")
            Image.fromarray((depth * _MILLIMETRES).round().astype(np.uint16)).save(target)
    return {split: f'DepthFolder:split={split}:root="{root}"' for split in counts}


def compose(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One scene: image uint8 `[96, 128, 3]` and depth [metres] float32 `[96, 128]`."""
    room = Room(rng.uniform(1.2, 1.8), rng.uniform(1.0, 2.0), rng.uniform(1.5, 3.5), rng.uniform(4.0, 9.0))
    image, depth = _draw_room(rng, room)
    distances = np.sort(rng.uniform(1.6, room.back - 0.3, size=rng.integers(2, 5)))[::-1]
    for distance in distances:  # back to front
        _draw_figure(rng, image, depth, room, float(distance))
    clear = np.exp(-depth / _VISIBILITY)[..., None]
    noisy = image * clear + np.array(_HAZE) * (1 - clear) + rng.normal(0, 3, image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), depth.astype(np.float32)


def _draw_room(rng: np.random.Generator, room: Room) -> tuple[np.ndarray, np.ndarray]:
    """Every pixel's ray, cut with the five planes; the nearest cut is what it sees."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    x = (columns + 0.5 - WIDTH / 2) / _FOCAL  # right of the axis, per metre of depth
    y = (rows + 0.5 - HEIGHT / 2) / _FOCAL  # below it
    with np.errstate(divide="ignore"):
        cuts = np.stack(
            [
                np.where(y > 0, room.camera / y, np.inf),
                np.where(y < 0, -room.ceiling / y, np.inf),
                room.side / np.abs(x),
                np.full_like(x, room.back),
            ]
        )
    surface, depth = cuts.argmin(axis=0), cuts.min(axis=0)
    # Where a surface is hit, in metres along its two directions.
    places = [(x * depth, depth), (x * depth, depth), (depth, y * depth), (x * depth, y * depth)]
    image = np.zeros((HEIGHT, WIDTH, 3))
    for i, (u, v) in enumerate(places):
        texture = _photo(str(rng.choice(_TEXTURES))) * rng.uniform(0.7, 1.1)
        offset = rng.integers(0, _TEXTURE_PX, size=2)
        inside = surface == i
        image[inside] = _sample(texture, u[inside], v[inside], offset)
    return image, depth


def _sample(texture: np.ndarray, u: np.ndarray, v: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Pixels of a texture that is repeated, mirrored, without end."""
    period = 2 * _TEXTURE_PX
    places = []
    for metres, start in ((v, offset[0]), (u, offset[1])):
        at = (np.floor(metres * _PIXELS_PER_METRE).astype(int) + start) % period
        places.append(np.minimum(at, period - 1 - at))
    return texture[places[0], places[1]]


def _draw_figure(rng: np.random.Generator, image: np.ndarray, depth: np.ndarray, room: Room, distance: float) -> None:
    """A flat cut-out that stands on the floor, parallel to the image."""
    height, width = rng.uniform(0.6, 1.7), rng.uniform(0.5, 1.2)
    centre = rng.uniform(-1, 1) * min(room.side - 0.6, 0.45 * WIDTH / _FOCAL * distance)
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    # In parts of the figure: 0 to 1 from left to right, and from its top to the floor.
    u = ((columns + 0.5 - WIDTH / 2) / _FOCAL * distance - centre) / width + 0.5
    v = ((rows + 0.5 - HEIGHT / 2) / _FOCAL * distance - room.camera) / height + 1
    inside = (u >= 0) & (u < 1) & (v >= 0) & (v < 1)
    if rng.random() < 0.5:  # an ellipse instead of a rectangle
        inside &= (2 * u - 1) ** 2 + (2 * v - 1) ** 2 < 1
    photo = _photo(str(rng.choice(_FIGURES)))
    image[inside] = photo[(v[inside] * _TEXTURE_PX).astype(int), (u[inside] * _TEXTURE_PX).astype(int)]
    depth[inside] = distance


_photos: dict[str, np.ndarray] = {}


def _photo(name: str) -> np.ndarray:
    """The middle of a photograph, float `[256, 256, 3]`."""
    if name not in _photos:
        picture = open_photo(photo_or_other(name, len(name)), short_side=_TEXTURE_PX)
        left, top = (picture.width - _TEXTURE_PX) // 2, (picture.height - _TEXTURE_PX) // 2
        box = (left, top, left + _TEXTURE_PX, top + _TEXTURE_PX)
        _photos[name] = np.asarray(picture.crop(box), dtype=np.float64)
    return _photos[name]


# --- The training ----------------------------------------------------------------------------------------------------


write_backbone = partial(write_random_backbone, patch_size=8)


def example_arguments(
    output_dir: Path, strings: dict[str, str], model: dict[str, Any], *, head: str, iterations: int
) -> list[str]:
    """What `run.py` is called with."""
    return [
        f"output_dir={output_dir}",
        *(f"model.{key}={value}" for key, value in model.items()),
        f"datasets.train={strings['train']}",
        f"datasets.val={strings['test']}",
        f"datasets.test={strings['test']}",
        f"decoder_head.type={head}",
        f"decoder_head.min_depth={_RANGE[0]}",
        f"decoder_head.max_depth={_RANGE[1]}",
        "decoder_head.n_output_channels=64",
        "decoder_head.backbone_out_layers=FOUR_LAST",
        "decoder_head.use_backbone_norm=false",  # it would take the contrast away, by which random features know haze
        *(
            ["decoder_head.head_kwargs={channels: 16, post_process_channels: [16, 16, 16, 16], n_hidden_channels: 16}"]
            if head == "dpt"
            else []
        ),
        "losses={SIGLOSS: 2.0, L1: 1.0, GRADIENT_LOSS: 0.1}",
        f"transforms.train={{random_crop: [{HEIGHT}, {WIDTH}], rotation_angle: 0.0}}",
        f"eval.min_depth={_RANGE[0]}",
        f"eval.max_depth={_RANGE[1]}",
        f"eval.eval_interval={max(iterations // 4, 1)}",
        f"scheduler.total_iter={iterations}",
        f"scheduler.constructor_kwargs={{warmup_iters: {iterations // 10}, final_div_factor: 1000}}",
        "optimizer.lr=3e-3",
        "bs=8",
        "num_workers=0",
        "result_config.save_results=true",
        "result_config.extension=PNG",
        "result_config.save_error_maps=true",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Make the data, train and test a head, write pictures and `report.md`. Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m dinov3.eval.depth.example", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output-dir", default="runs/depth-example")
    parser.add_argument("--head", choices=("linear", "dpt"), default="dpt")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--scenes", type=int, default=200, help="number of training scenes")
    parser.add_argument("--test-scenes", type=int, default=N_TEST, help="number of test scenes")
    parser.add_argument("--config-file", help="configuration of the training that made the backbone (with --weights)")
    parser.add_argument("--weights", help="the backbone that was trained; default: random weights")
    args = parser.parse_args(argv)
    output_dir = Path(args.output_dir)
    strings = make_example(output_dir / "data", n_train=args.scenes, n_test=args.test_scenes)
    config_file, weights = args.config_file, args.weights
    if config_file is None or weights is None:
        config_file, weights = write_backbone(output_dir)
    model = {"config_file": config_file, "pretrained_weights": weights}

    from dinov3.eval.depth import run
    from dinov3.eval.helpers import cli_parser
    from dinov3.run.init import job_context

    arguments = example_arguments(output_dir, strings, model, head=args.head, iterations=args.iterations)
    with job_context(output_dir=output_dir, distributed_enabled=False):
        results = run.benchmark_launcher(cli_parser(arguments))
        rows = guesses(output_dir / "data")
        rows[f"{args.head} head on the backbone"] = {name: results[f"DepthFolder_{name}"] for name in _REPORTED}
        write_report(output_dir, rows)
    return 0


def guesses(root: Path) -> dict[str, dict[str, float]]:
    """Metrics on the test scenes of predictions that don't look at the image: medians of the training scenes."""
    from PIL import Image

    from dinov3.eval.depth.metrics import calculate_depth_metrics

    train, test = (
        np.stack(
            [np.asarray(Image.open(path)) / _MILLIMETRES for path in sorted((root / "depth" / split).glob("*.png"))]
        )
        for split in ("train", "test")
    )
    rivals = {
        "one depth for all pixels": np.full_like(test[0], np.median(train)),
        "usual depth of each place": np.median(train, axis=0),
    }
    found = {}
    for name, guess in rivals.items():
        prediction = torch.from_numpy(guess)
        scenes = [
            calculate_depth_metrics(truth, prediction, torch.ones_like(truth, dtype=torch.bool))
            for truth in torch.from_numpy(test)
        ]
        found[name] = {metric: float(torch.stack([s[metric] for s in scenes]).mean()) for metric in _REPORTED}
    return found


def write_report(folder: Path, rows: Mapping[str, Mapping[str, float]]) -> Path:
    """Write `report.md`: a table of the rivals, and where the pictures are."""
    lines = [f"| {name} | {m['abs_rel']:.3f} | {m['rmse']:.2f} | {100 * m['a1']:.1f} |" for name, m in rows.items()]
    text = "\n".join(
        [
            "# Depth of hazy rooms",
            "",
            "| prediction | mean relative error | RMSE [m] | pixels within a factor of 1.25 [%] |",
            "|---|---|---|---|",
            *lines,
            "",
            "Pictures: `visualizations/depth_<n>.png` (image, truth, prediction), `visualizations/error_<n>.png`;",
            "all metrics: `results-depth.csv`; the head: `head.pth`.",
            "",
        ]
    )
    (folder / REPORT).write_text(text)
    logger.info("%s", text)
    return folder / REPORT


if __name__ == "__main__":
    sys.exit(main())
