"""What every `python -m dinov3.eval.<task>.predict` does: a trained head over files and folders of images.

The task says how one image becomes files; this collects the images, reads them, and reports those that can't be read.
"""

import argparse
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dinov3.data.datasets.decoders import UndecodableImageError, UprightImageDataDecoder
from dinov3.data.datasets.index_cache import SUFFIXES
from dinov3.utils.device import default_device

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("dinov3")

PredictOne = Callable[[nn.Module, "Image", Path, argparse.Namespace], None]

_EXAMPLES = """examples:
  # one image, with the head that a training left in runs/{task} and released backbone weights
  python -m dinov3.eval.{task}.predict --head runs/{task} --images photo.jpg --output-dir out \\
      --backbone-weights path/to/weights.pth
  # all images below a folder; the head file alone
  python -m dinov3.eval.{task}.predict --head runs/{task}/head.pth --images photos/ --output-dir out
"""


def predict_main(
    argv: Sequence[str] | None,
    *,
    task: str,
    description: str,
    predict_one: PredictOne,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """The command: parse, load the head, predict every image, report. Returns 0; 1 if no image could be read.

    Args:
        argv: arguments without the program's name; None: those of this process.
        task: name of the task's folder; head files of other tasks are refused.
        description: what is written, for `--help`.
        predict_one: `(model, image, path, args)` writes files whose names begin with `path`, a path without extension
            (`path.parent` exists). The image is RGB and upright; `model.head_file` holds names and statistics.
        add_arguments: adds the task's own options to the parser.

    Raises:
        FileNotFoundError: no such head or images.
        ValueError: no head of this task.
    """
    args = _parser(task, description, add_arguments).parse_args(argv)
    from dinov3.run.init import job_context

    with job_context(output_dir=args.output_dir, distributed_enabled=False):
        model = _load(args, task)
        images = collect_images(args.images)
        skipped = predict_images(model, images, Path(args.output_dir), predict_one, args)
    return 1 if len(skipped) == len(images) else 0


def _parser(
    task: str, description: str, add_arguments: Callable[[argparse.ArgumentParser], None] | None
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m dinov3.eval.{task}.predict",
        description=description,
        epilog=_EXAMPLES.format(task=task),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--head", required=True, help="head file, or the output folder of the training that wrote it")
    parser.add_argument("--images", required=True, nargs="+", help="image files, and folders of them")
    parser.add_argument("--output-dir", required=True, help="folder for the results, named after the images")
    parser.add_argument("--backbone-weights", help="weights of the backbone; default: the released ones")
    parser.add_argument("--device", help="where to compute; default: the accelerator if there is one")
    if add_arguments is not None:
        add_arguments(parser)
    return parser


def _load(args: argparse.Namespace, task: str) -> nn.Module:
    from dinov3.checkpointer.heads import read_head
    from dinov3.hub import load_head

    found = read_head(args.head).task
    if found != task:
        raise ValueError(f"{args.head} is a head for {found}: use python -m dinov3.eval.{found}.predict")
    return load_head(args.head, backbone_weights=args.backbone_weights, device=args.device or default_device())


def collect_images(sources: Iterable[str | Path]) -> dict[str, Path]:
    """Image files by the name of their results: relative paths without extension, unique.

    Args:
        sources: files, whatever their extension, and folders, of which all images below count, in sorted order.

    Raises:
        FileNotFoundError: a source that isn't there, or no image at all.
    """
    found: dict[Path, Path] = {}  # file -> relative path; a file named twice counts once
    for source in map(Path, sources):
        if source.is_dir():
            files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
            found |= {path: path.relative_to(source) for path in files if path not in found}
        elif source.is_file():
            found.setdefault(source, Path(source.name))
        else:
            raise FileNotFoundError(f"--images: {source} is neither a file nor a folder")
    if not found:
        raise FileNotFoundError(f"--images: no image in {', '.join(map(str, sources))} (of {', '.join(SUFFIXES)})")
    return {name: path for path, name in zip(found, _unique_names(list(found.values())), strict=True)}


def _unique_names(paths: Sequence[Path]) -> list[str]:
    """`a/b` for `a/b.jpg`; `a/b_jpg` where there is an `a/b.png` too; with a number where that isn't enough."""
    stems = Counter(path.with_suffix("").as_posix() for path in paths)
    names: list[str] = []
    for path in paths:
        stem = path.with_suffix("").as_posix()
        name = stem if stems[stem] == 1 else f"{stem}_{path.suffix.removeprefix('.')}"
        taken = sum(other == name or other.startswith(f"{name}-") for other in names)
        names.append(f"{name}-{taken + 1}" if taken else name)
    return names


def predict_images(
    model: nn.Module, images: dict[str, Path], output_dir: Path, predict_one: PredictOne, args: Any = None
) -> dict[Path, str]:
    """Predict every image that can be read; return file -> reason of the others, also written to `skipped.txt`."""
    skipped: dict[Path, str] = {}
    for number, (name, file) in enumerate(images.items(), start=1):
        try:
            image = UprightImageDataDecoder(file.read_bytes()).decode()
        except (OSError, UndecodableImageError) as error:
            skipped[file] = str(error)
            logger.warning("skipping %s: %s", file, error)
            continue
        target = output_dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        predict_one(model, image, target, args)
        logger.info("%d of %d: %s -> %s*", number, len(images), file, target)
    report = output_dir / "skipped.txt"
    if skipped:
        report.write_text("".join(f"{file}\t{reason}\n" for file, reason in skipped.items()), encoding="utf-8")
    else:
        report.unlink(missing_ok=True)  # of an earlier call
    logger.info("%d images predicted, %d skipped; results in %s", len(images) - len(skipped), len(skipped), output_dir)
    return skipped
