"""A segmentation data set whose truth is exact, made of real photographs on this machine, and a head trained on it.

    python -m dinov3.eval.segmentation.example --output-dir runs/segmentation-example

Scenes are collages: pieces of photographed things (brick, grass, fur, coins, ...) with curved borders, each in a light
of its own. Training scenes are cut from the left parts of the photographs, those for validation from the right parts.
The training is that of `run.py`, on the backbone of the quick start if `runs/quickstart` is there (`make quickstart`),
else on a random one, or on what `model.…=` names. `report.md` compares it with the commonest class everywhere, and with
the same head on the colours of each patch.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.data.photos import available_photos, open_photo
from dinov3.eval.example_backbone import quickstart_backbone, write_random_backbone

logger = logging.getLogger("dinov3")

SIZE = 128  # px of a scene
SHORT_SIDE = 320  # px that photographs are scaled to, as for the quick start
CLASSES = ("brick", "cat", "china", "coffee", "coins", "flower", "galaxies", "grass", "gravel", "tissue", "writing")
PATCH = 8  # px, of the quick start's backbone
_TRAIN_SHARE, _GAP = 0.6, 8  # of the width of a photograph; px between the parts
_PIECES = (3, 6)
_SPLITS = ("train", "val")


def make_example(root: Path, n_train: int = 160, n_val: int = 32, seed: int = 0) -> dict[str, str]:
    """Write the data set, unless it is there, and return the dataset strings of its splits.

    Args:
        root: gets `images/<split>/<n>.png`, `annotations/<split>/<n>.png` and `classes.txt`.
        n_train, n_val: number of scenes.
        seed: of the scenes.

    Raises:
        FileNotFoundError: no photographs on this machine.
    """
    from PIL import Image

    photos = {photo.name: photo for photo in available_photos() if photo.name in CLASSES}
    names = [name for name in CLASSES if name in photos]
    if len(names) < 2:
        raise FileNotFoundError("the photographs of the example are not on this machine: install 'dinov3[demo]'")
    sources = [np.asarray(open_photo(photos[name], SHORT_SIDE)) for name in names]
    for number, (split, count) in enumerate({"train": n_train, "val": n_val}.items()):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            target = root / "annotations" / split / f"{i:04d}.png"
            if not target.is_file():
                image, labels = draw_scene(sources, split, np.random.default_rng([seed, number, i]))
                Image.fromarray(image).save(root / "images" / split / target.name)
                Image.fromarray(labels).save(target)  # last: it says that the pair is complete
    (root / "classes.txt").write_text("\n".join(names) + "\n")
    return {split: f"SegmentationFolder:split={split}" for split in _SPLITS}


def draw_scene(
    sources: Sequence[np.ndarray], split: str, rng: np.random.Generator, size: int = SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """A collage of pieces: uint8 [size, size, 3], and the number of the source of each pixel, uint8 [size, size]."""
    pieces = int(rng.integers(_PIECES[0], _PIECES[1], endpoint=True))
    region = _draw_regions(pieces, rng, size)
    classes = rng.choice(len(sources), size=min(pieces, len(sources)), replace=False)
    labels = classes[region % len(classes)].astype(np.uint8)
    image = np.zeros((size, size, 3), dtype=np.uint8)
    for label in np.unique(labels):
        mask = labels == label
        image[mask] = _draw_piece(sources[label], split, rng, size)[mask]
    return image, labels


def _draw_regions(pieces: int, rng: np.random.Generator, size: int) -> np.ndarray:
    """The nearest of some random places, seen through waves that bend the borders: integers [size, size]."""
    y, x = np.mgrid[:size, :size].astype(np.float64)
    phase = rng.uniform(0, 2 * np.pi, size=4)
    wave = size / 16
    bent_x = x + wave * np.sin(4 * np.pi * y / size + phase[0]) + wave / 2 * np.sin(8 * np.pi * y / size + phase[1])
    bent_y = y + wave * np.sin(4 * np.pi * x / size + phase[2]) + wave / 2 * np.sin(8 * np.pi * x / size + phase[3])
    places = rng.uniform(0, size, size=(pieces, 2))
    distance = (bent_y[..., None] - places[:, 0]) ** 2 + (bent_x[..., None] - places[:, 1]) ** 2
    return distance.argmin(-1)


def _draw_piece(source: np.ndarray, split: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """A square of a photograph in another light, from the part of the split."""
    cut = int(source.shape[1] * _TRAIN_SHARE)
    left, right = (0, cut) if split == "train" else (cut + _GAP, source.shape[1])
    part = source[:, left:right]
    part = np.concatenate([part, part[:, ::-1]], axis=1)  # mirrored where the part is narrower than the scene
    top = rng.integers(part.shape[0] - size, endpoint=True)
    first = rng.integers(max(part.shape[1] - size, 0), endpoint=True)
    square = part[top : top + size, first : first + size].astype(np.float64)
    light = rng.uniform(0.6, 1.3) * rng.uniform(0.8, 1.2, size=3)
    return (square * light).clip(0, 255).astype(np.uint8)


class RawPatches(nn.Module):
    """The pixels of each patch in place of features: what a backbone has to beat."""

    def __init__(self, patch_size: int = PATCH) -> None:
        super().__init__()
        self.patch_size = self.stride = patch_size
        self.embed_dim = 3 * patch_size**2
        self.embed_dims = [self.embed_dim]
        self.n_blocks = 1
        self.n_storage_tokens = 0

    def get_intermediate_layers(self, x: Tensor, n: Any = 1, **_: Any) -> tuple[Any, ...]:
        """Pixels [B, 3 * p * p, h, w], their mean, and no storage tokens."""
        patches = F.pixel_unshuffle(x, self.patch_size)
        return ((patches, patches.mean((2, 3)), patches.new_zeros(len(x), 0, self.embed_dim)),)


def majority_metrics(root: Path, num_classes: int) -> dict[str, float]:
    """Metrics of predicting the commonest class of the training scenes everywhere."""
    from dinov3.data.datasets import SegmentationFolder
    from dinov3.eval.segmentation.eval import summarize_areas
    from dinov3.eval.segmentation.metrics import calculate_intersect_and_union

    train, val = (_all_labels(SegmentationFolder(root=root, split=split)) for split in _SPLITS)
    commonest = int(np.bincount(np.concatenate([labels.flatten() for labels in train])).argmax())
    areas = [
        calculate_intersect_and_union(torch.full(labels.shape, commonest), torch.from_numpy(labels.copy()), num_classes)
        for labels in val
    ]
    return summarize_areas(torch.stack(areas))


def _all_labels(dataset: Any) -> list[np.ndarray]:
    return [np.asarray(dataset.decode_target(i)) for i in range(len(dataset))]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: make the data, train a head and its rivals, write `report.md`. Returns 0."""
    parser = argparse.ArgumentParser(
        "python -m dinov3.eval.segmentation.example",
        description="Train a linear segmentation head on collages of real photographs, in minutes on a CPU.",
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of data, head, pictures and report")
    parser.add_argument("--train-images", type=int, default=160)
    parser.add_argument("--val-images", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("opts", nargs="*", metavar="key=value", help="overrides of the configuration of run.py")
    args = parser.parse_args(argv)
    from dinov3.run.init import job_context

    with job_context(output_dir=args.output_dir, distributed_enabled=False):
        results = train_example(args.output_dir, args.train_images, args.val_images, args.iterations, args.opts)
        write_report(args.output_dir, results)
    return 0


def train_example(
    folder: Path, n_train: int, n_val: int, iterations: int, opts: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Metrics by name of the rival: the commonest class, the colours of patches, the backbone."""
    from dinov3.eval.helpers import args_dict_to_dataclass, cli_parser
    from dinov3.eval.segmentation.config import SegmentationConfig
    from dinov3.eval.segmentation.run import benchmark_launcher
    from dinov3.eval.segmentation.train import train_segmentation

    data = folder / "data"
    strings = make_example(data, n_train, n_val)
    n_classes = len((data / "classes.txt").read_text().split())
    results = {"commonest class": majority_metrics(data, n_classes)}
    common = _settings(data, strings, n_classes, iterations)
    config, _ = args_dict_to_dataclass(cli_parser(common), SegmentationConfig, save_config=False)
    config.output_dir, config.eval.n_pictures = str(folder / "raw-patches"), 0
    results["linear head on raw pixels"] = train_segmentation(RawPatches(), config)
    model = [] if any(opt.startswith("model.") for opt in opts) else _default_backbone(folder)
    arguments = cli_parser([*common, *model, *opts, f"output_dir={folder / 'head'}"])
    results["linear head on the backbone"] = benchmark_launcher(arguments)
    return results


def _settings(data: Path, strings: dict[str, str], n_classes: int, iterations: int) -> list[str]:
    """Arguments of `run.py` for the scenes: small images, few steps."""
    return [
        f"datasets.root={data}",
        f"datasets.train={strings['train']}",
        f"datasets.val={strings['val']}",
        "decoder_head.type=linear",
        f"decoder_head.num_classes={n_classes}",
        "eval.reduce_zero_label=false",
        "eval.mode=whole",
        f"eval.eval_interval={iterations}",
        f"scheduler.total_iter={iterations}",
        f"scheduler.constructor_kwargs.warmup_iters={iterations // 20}",
        "scheduler.constructor_kwargs.warmup_ratio=1e-6",
        "scheduler.constructor_kwargs.use_beta1=false",
        "scheduler.constructor_kwargs.update_momentum=false",
        "optimizer.lr=5e-3",
        f"transforms.train.crop_size=[{SIZE},{SIZE}]",
        "transforms.train.flip_prob=0.5",
        "bs=8",
        "num_workers=0",
    ]


def _default_backbone(folder: Path) -> list[str]:
    """Arguments for the backbone of the quick start; without one, for a random backbone of its architecture.

    The random one is written beside the results, so that the head can be used later.
    """
    if (found := quickstart_backbone()) is not None:
        return found
    config, weights = write_random_backbone(folder, patch_size=PATCH, layerscale=1.0)
    return [f"model.config_file={config}", f"model.pretrained_weights={weights}"]


def write_report(folder: Path, results: dict[str, dict[str, float]]) -> Path:
    """Write `report.md`: a table of the rivals, and where the pictures are."""
    rows = [f"| {name} | {m['mIoU']:.1f} | {m['aAcc']:.1f} |" for name, m in results.items()]
    text = "\n".join(
        [
            "# Segmentation of collages of photographs",
            "",
            "| prediction | mIoU [%] | pixels right [%] |",
            "|---|---|---|",
            *rows,
            "",
            "Pictures of image, truth and prediction: `head/pictures/`; classes one by one:",
            "`head/results-per-class.csv`; the head: `head/head.pth`.",
            "",
        ]
    )
    (folder / "report.md").write_text(text)
    logger.info("%s", text)
    return folder / "report.md"


if __name__ == "__main__":
    sys.exit(main())
