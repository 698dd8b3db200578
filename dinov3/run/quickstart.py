"""Quick start: pretrain a small backbone on real images, evaluate it, and explain the result in pictures.

    python -m dinov3.run.quickstart [--output-dir runs/quickstart] [--seed 0] [key=value ...]

Minutes on a CPU, without downloads. The steps are those of any training: an image folder (`quickstart_data.py`), the
training script with `configs/train/quickstart.yaml`, the exported teacher, a k-NN evaluation of frozen features
(`quickstart_evaluation.py`). Pictures come from `quickstart_figures.py`, the page that explains them from
`quickstart_report.py`.
"""

import argparse
import contextlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from dinov3.configs import DinoV3SetupArgs, get_cfg_from_args
from dinov3.data.photos import available_photos, open_photo
from dinov3.logging import cleanup_logging, setup_logging
from dinov3.run import explore, quickstart_report
from dinov3.run import quickstart_figures as figures
from dinov3.run.quickstart_data import write_image_folder
from dinov3.run.quickstart_evaluation import FinishedRun, neighbours_of, patch_features
from dinov3.train.train import main as train

logger = logging.getLogger("dinov3")

CONFIG = Path(str(files("dinov3.configs.train").joinpath("quickstart.yaml")))
N_TRAIN, N_VAL = 200, 60  # images per class
MAP_SIDE = 384  # px of the shorter side of photographs whose patches are shown
MAP_PHOTOS = ("cat", "astronaut", "flower")  # whose patches are shown (those that are there)
# Photographs with a place whose patch is compared with all others, as parts of the width and of the height.
QUERIES = {"cat": (0.4, 0.37), "coins": (0.4, 0.165), "china": (0.28, 0.42)}
EXPLORE_PAGE, EXPLORE_SIZE = (
    "explore.html",
    256,
)  # the page to point at patches, and the height of its pictures [pixels]
MARKER = ".quickstart"  # in folders that the quick start may clear
PICTURES = ("samples", "losses", "accuracy", "neighbours", "pca", "similarity")


_EXAMPLES = """examples:
  dinov3 quickstart
  dinov3 quickstart --output-dir runs/other --seed 1 optim.epochs=8
"""


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the quick start."""
    parser = argparse.ArgumentParser(
        "dinov3 quick start",
        allow_abbrev=False,
        description="Pretrain a small backbone on real images in minutes, evaluate it, and write report.html.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quickstart"), help="what it holds is replaced")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights, crops and masks")
    parser.add_argument("opts", nargs="*", metavar="key=value", help=f"overrides of the training's {CONFIG.name}")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the whole quick start; returns what `report.json` holds.

    Raises:
        ValueError: the output folder holds something else.
    """
    args = get_args_parser().parse_args(argv)
    started = time.perf_counter()
    output_dir = prepare_output_dir(args.output_dir)
    images, training = output_dir / "images", output_dir / "training"

    setup_logging(level=logging.INFO)
    counts = write_image_folder(images, n_train=N_TRAIN, n_val=N_VAL, seed=args.seed)
    logger.info("Wrote %d training and %d held-out images to %s", counts["train"], counts["val"], images)

    training_started = time.perf_counter()
    with cores_left_to_loaders(args.opts):
        train(training_arguments(images, training, args.seed, args.opts))
    seconds_training = time.perf_counter() - training_started

    setup_logging(level=logging.INFO)  # the training has taken down its own
    logger.info("Evaluating frozen features on held-out images")
    run = FinishedRun.load(images, training, args.seed)
    report = run.measure() | {"seed": args.seed, "seconds_training": round(seconds_training, 1)}
    draw(output_dir, run, report)
    photos = {
        source.title: open_photo(source) for source in available_photos() if source.name in {*MAP_PHOTOS, *QUERIES}
    }
    (output_dir / EXPLORE_PAGE).write_text(explore.render(run.trained, photos, EXPLORE_SIZE), encoding="utf-8")
    report["seconds"] = round(time.perf_counter() - started, 1)
    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    page = quickstart_report.render(report, {name: output_dir / f"{name}.png" for name in PICTURES})
    (output_dir / "report.html").write_text(page, encoding="utf-8")
    logger.info(
        "Held-out images classified correctly: raw pixels %.1f %%, random backbone %.1f %%, trained backbone %.1f %%",
        *(report[key] for key in ("knn_pixels", "knn_random", "knn_trained")),
    )
    logger.info("%.0f seconds in all. The report: %s", report["seconds"], output_dir / "report.html")
    cleanup_logging()
    return report


def prepare_output_dir(path: Path) -> Path:
    """A folder at `path` for this run alone: what an earlier quick start has left there is removed.

    Raises:
        ValueError: there is something that no quick start has written.
    """
    path = path.expanduser().resolve()
    marker = path / MARKER
    if path.exists() and any(path.iterdir()) and not marker.exists():
        raise ValueError(
            f"--output-dir {path} holds other files: name a folder that is new, empty, or of a quick start"
        )
    path.mkdir(parents=True, exist_ok=True)
    marker.write_text("Here the quick start writes, and removes what it wrote before.\n")
    for name in ("images", "training"):
        shutil.rmtree(path / name, ignore_errors=True)
    for name in ("report.json", "report.html", EXPLORE_PAGE, *(f"{name}.png" for name in PICTURES)):
        (path / name).unlink(missing_ok=True)
    return path


def training_arguments(images: Path, output_dir: Path, seed: int, overrides: Sequence[str] = ()) -> list[str]:
    """What to call `dinov3.train.train.main` with."""
    options = ["--config-file", str(CONFIG), "--output-dir", str(output_dir), "--seed", str(seed)]
    return [*options, f"train.dataset_path=ImageFolder:root={images / 'train'}", f"train.seed={seed}", *overrides]


@contextlib.contextmanager
def cores_left_to_loaders(overrides: Sequence[str]) -> Iterator[None]:
    """Compute with one thread less for every process that makes crops.

    More threads than cores wait for each other at every operation: on two busy cores, iterations with two threads and
    two loaders took four times as long as with one of each.
    """
    cfg = get_cfg_from_args(DinoV3SetupArgs(config_file=str(CONFIG), opts=list(overrides)))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, n_threads - cfg.train.num_workers))
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def draw(output_dir: Path, run: FinishedRun, report: dict[str, Any]) -> None:
    """All pictures of the report, `<name>.png` for the names in PICTURES."""
    path = {name: output_dir / f"{name}.png" for name in PICTURES}
    backbones = {"random backbone": run.random, "trained backbone": run.trained}
    figures.draw_samples(
        path["samples"], {name: run.colour.train.of_class(label)[:4] for label, name in enumerate(run.class_names)}
    )
    figures.draw_losses(path["losses"], run.metrics)
    figures.draw_accuracies(
        path["accuracy"],
        bars={"raw pixels": report["knn_pixels"], "random": report["knn_random"], "trained": report["knn_trained"]},
        course={int(iteration): accuracy for iteration, accuracy in report["knn_course"].items()},
        chance=report["chance"],
    )
    queries = run.grey.val.select(run.grey.val.first_of_each_class()[::2])
    figures.draw_neighbours(
        path["neighbours"],
        queries.files,
        {name: neighbours_of(backbone, queries, run.grey.train, n=6) for name, backbone in backbones.items()},
    )
    pca, similarity = [], []
    for source in available_photos():
        name = source.name
        if name not in {*MAP_PHOTOS, *QUERIES}:
            continue
        photo = open_photo(source, MAP_SIDE)
        features = [patch_features(backbone, photo) for backbone in backbones.values()]
        if name in MAP_PHOTOS:
            pca.append(figures.MapRow(name, photo, [figures.pca_colours(one) for one in features]))
        if name in QUERIES:
            x, y = QUERIES[name]
            maps = [figures.similarity_map(one, x, y) for one in features]
            similarity.append(figures.MapRow(name, photo, maps, query=(x * photo.width, y * photo.height)))
    figures.draw_maps(path["pca"], pca, titles=list(backbones))
    figures.draw_maps(path["similarity"], similarity, titles=list(backbones))


if __name__ == "__main__":
    main(sys.argv[1:])
