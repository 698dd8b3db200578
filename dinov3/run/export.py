"""Export the backbone of a training, of any weight file, or a model with a trained head, for others to use.

    python -m dinov3.run.export OUT                      OUT/backbone.pth, in the layout of Meta's releases
    python -m dinov3.run.export OUT backbone.safetensors
    python -m dinov3.run.export OUT hf_folder --format hf
    python -m dinov3.run.export weights.pth timm.pth --format timm
    python -m dinov3.run.export OUT backbone.onnx --format onnx [--half]    or pt2, for torch.export.load
    python -m dinov3.run.export HEAD head.onnx --format onnx --backbone-weights weights.pth

Runs on the CPU, without a process group, whatever wrote the weights.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov3.checkpointer import find_latest_checkpoint
from dinov3.checkpointer.export import FORMATS, export_backbone
from dinov3.checkpointer.files import is_dcp
from dinov3.checkpointer.heads import is_head_file
from dinov3.checkpointer.weights import load_weights, read_weights
from dinov3.hub import load_head
from dinov3.logging import cleanup_logging, setup_logging
from dinov3.models.graph import GRAPH_FORMATS, export_graph

logger = logging.getLogger("dinov3")

DEFAULT_NAMES = {
    "meta": "backbone.pth",
    "hf": "hf",
    "timm": "timm.safetensors",
    "onnx": "backbone.onnx",
    "pt2": "backbone.pt2",
}
_CONVNEXT_STEM = "downsample_layers.0.0.weight"


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "dinov3 export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="output folder of a training, checkpoint folder, weight or head file")
    parser.add_argument("destination", nargs="?", help="file, or folder for hf (default: beside the source)")
    parser.add_argument(
        "--format", choices=(*FORMATS, *GRAPH_FORMATS), default="meta", help="layout (default: %(default)s)"
    )
    parser.add_argument("--network", help="which network of a training checkpoint (default: the EMA teacher)")
    parser.add_argument("--config-file", help="training configuration, for hf, onnx, pt2 (default: the training's)")
    parser.add_argument("--half", action="store_true", help="onnx and pt2: weights and products in float16")
    parser.add_argument("--backbone-weights", help="of the backbone that a head stands on (default: the released ones)")
    parser.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        default=(224, 224),
        metavar=("HEIGHT", "WIDTH"),
        help="that graphs are recorded with; of any importance for detectors only, which take no other (default: 224)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Export as the command line says; returns what was written."""
    args = get_args_parser().parse_args(argv)
    setup_logging(name="dinov3", level=logging.INFO)
    try:
        return export(
            args.source,
            args.destination,
            args.format,
            network=args.network,
            config_file=args.config_file,
            half=args.half,
            backbone_weights=args.backbone_weights,
            image_size=tuple(args.image_size),
        )
    finally:
        cleanup_logging(name="dinov3")


def export(
    source: str,
    destination: str | None = None,
    format: str = "meta",
    *,
    network: str | None = None,
    config_file: str | None = None,
    half: bool = False,
    backbone_weights: str | None = None,
    image_size: tuple[int, int] = (224, 224),
) -> Path:
    """Write the backbone in `source`, or as a graph the model of a head file, to `destination`; returns the path.

    Raises:
        FileNotFoundError: there are no weights, or no configuration where one is needed.
        ValueError: the weights can't be read or can't be written in this layout.
    """
    if format in FORMATS and half:
        raise ValueError(f"--half is for {' and '.join(GRAPH_FORMATS)}; got the format {format}")
    if is_head_file(source):
        return _export_head(source, destination, format, backbone_weights, half=half, image_size=image_size)
    folder, weights = locate(source, network)
    path = Path(destination) if destination else folder / DEFAULT_NAMES[format]
    state = read_weights(weights, network=network)
    if format in GRAPH_FORMATS:
        backbone, _ = build_around(state, config_file or find_config(folder))
        channels = state["patch_embed.proj.weight" if "patch_embed.proj.weight" in state else _CONVNEXT_STEM].shape[1]
        written = export_graph(backbone, path, format, image_size=image_size, in_channels=channels, half=half)
    elif format == "hf":
        backbone, statistics = build_around(state, config_file or find_config(folder))
        written = export_backbone(backbone, path, format, statistics=statistics)
    else:
        written = export_backbone(state, path, format)
    logger.info("%s -> %s (%s layout, %d tensors)", weights, written, format, len(state))
    return written


def _export_head(
    source: str, destination: str | None, format: str, backbone_weights: str | None, **options: Any
) -> Path:
    """The model of a head file on its backbone as a graph, by default beside the file."""
    if format not in GRAPH_FORMATS:
        raise ValueError(f"{source} is a trained head: it is written as {' or '.join(GRAPH_FORMATS)}, not as {format}")
    file = Path(source).expanduser()
    folder = file if file.is_dir() else file.parent
    model = load_head(file, backbone_weights)
    written = export_graph(model, Path(destination) if destination else folder / f"head.{format}", format, **options)
    logger.info("%s -> %s", source, written)
    return written


def locate(source: str, network: str | None = None) -> tuple[Path, Any]:
    """(folder of the training or file, weights): the newest export of a training, else its newest checkpoint.

    Exports hold the EMA teacher alone: another network is taken from the checkpoint.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        return path.parent, source
    if is_dcp(path) or (path / "config.json").exists():
        return path.parent, path
    exported = path / "teacher_checkpoint.pth"
    if exported.exists() and network in (None, "teacher"):
        return path, exported
    checkpoint = find_latest_checkpoint(path / "ckpt")
    if checkpoint is None:
        raise FileNotFoundError(
            f"{path} holds no checkpoint in ckpt/, and only those hold the {network}"
            if exported.exists()
            else f"{path} holds neither teacher_checkpoint.pth nor a checkpoint in ckpt/"
        )
    return path, checkpoint


def find_config(folder: Path) -> str:
    """The configuration of the training in this folder or one above it (checkpoints lie in sub-folders)."""
    for candidate in (folder, *folder.resolve().parents[:2]):
        if (candidate / "config.yaml").exists():
            return str(candidate / "config.yaml")
    raise FileNotFoundError(f"no config.yaml in or above {folder}; name the training's with --config-file")


def build_around(
    state: dict[str, torch.Tensor], config_file: str
) -> tuple[nn.Module, tuple[tuple[float, ...], tuple[float, ...]]]:
    """The backbone of a training configuration with these weights; mean and standard deviation of its images."""
    from dinov3.configs import DinoV3SetupArgs, get_cfg_from_args
    from dinov3.models.build import build_backbone

    cfg = get_cfg_from_args(DinoV3SetupArgs(config_file=config_file, allow_unknown_keys=True), strict=False)
    backbone = build_backbone(cfg.student, device="meta")
    load_weights(backbone, state, assign=True)
    return backbone, (tuple(cfg.crops.rgb_mean), tuple(cfg.crops.rgb_std))


if __name__ == "__main__":
    main(sys.argv[1:])
