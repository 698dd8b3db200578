"""dino.txt in minutes on a CPU: photographs that packages bring along, with captions, and all commands on them.

    python -m dinov3.eval.text.example --output-dir runs/text-example

Trains tiny towers on the pairs, measures retrieval on the same pairs, classifies and segments collages without further
training, and leaves results and pictures of each.
"""

import argparse
import csv
import gzip
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dinov3.data.photos import Photo, available_photos, open_photo

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("dinov3")

SHORT_SIDE = 96  # px of the photographs
IMAGE_SIZE = 64  # px of the training crops
PATCH_SIZE = 8
GREY = "in black and white"
TEMPLATE = "{}"

_ARCH = "vit_nano"  # 0.8 million parameters

_VISION_CONFIG = f"""\
student:
  {{arch: {_ARCH}, patch_size: {PATCH_SIZE}, layerscale: 1.0, pos_embed_rope_dtype: fp32, n_storage_tokens: 1}}
crops: {{global_crops_size: {IMAGE_SIZE}}}
"""
_TEXT_CONFIG = """\
context_length: 48
vocab_size: 514 # bytes, bytes at the end of a word, start and end
dim: 64
num_heads: 2
num_layers: 2
ffn_ratio: 4.0
is_causal: true
"""
_TRAINING = """\
embed_dim: 192
vision_backbone_config: {root}/vision_backbone.yaml
vision_model_freeze_backbone: false # it is trained from scratch
vision_model_train_img_size: {image_size}
vision_model_use_patch_tokens: true
vision_model_num_head_blocks: 1
vision_model_head_blocks_drop_path: 0.0
text_backbone_config: {root}/text_backbone.yaml
text_model_tokens_pooler_type: argmax
text_model_use_linear_projection: true
text_vocab_path_or_url: {root}/bytes.txt.gz
train_dataset_str: CaptionList:file="{root}/captions.csv"
eval_dataset_str: CaptionList:file="{root}/captions.csv"
batch_size: {n_pairs}
num_workers: 0
max_iteration: 200
warmup_length: 20
lr: 2.0e-3
weight_decay: 1.0e-4
checkpointing_period: 50
eval_freq: 100
use_fsdp: false
do_compile: false
use_ac: false
"""


class Example(NamedTuple):
    """What `make_example` has written.

    Attributes:
        captions: dataset string of (image, caption) pairs.
        classes: dataset string of (image, class index).
        masks: dataset string of (image, mask).
        class_names: file with a name per class.
        training: configuration of the training.
    """

    captions: str
    classes: str
    masks: str
    class_names: Path
    training: Path


def make_example(root: Path, photos: Sequence[Photo] | None = None) -> Example:
    """Write pairs, collages with masks, a vocabulary and configurations below `root`.

    Colour photographs come twice, as they are and in grey, with two captions that say so.

    Args:
        root: made if needed.
        photos: which ones; None: all that are on this machine.

    Raises:
        RuntimeError: fewer than two photographs are on this machine; the message says how to get them.
    """
    photos = available_photos() if photos is None else photos
    if len(photos) < 2:
        raise RuntimeError("this example needs the photographs of scikit-image: pip install 'dinov3[demo]'")
    root.mkdir(parents=True, exist_ok=True)
    root = root.resolve()
    pictures = {photo: open_photo(photo, SHORT_SIDE) for photo in photos}
    n_pairs = _write_pairs(root, pictures)
    _write_classes(root, pictures)
    _write_collages(root / "collages", pictures)
    # A vocabulary without a merge: every byte is a token.
    (root / "bytes.txt.gz").write_bytes(gzip.compress(b"#version: bytes\n", mtime=0))
    (root / "vision_backbone.yaml").write_text(_VISION_CONFIG)
    (root / "text_backbone.yaml").write_text(_TEXT_CONFIG)
    training = root / "training.yaml"
    training.write_text(_TRAINING.format(root=root, image_size=IMAGE_SIZE, n_pairs=n_pairs))
    return Example(
        captions=f'CaptionList:file="{root}/captions.csv"',
        classes=f'ImageList:file="{root}/classes.csv"',
        masks=f'SegmentationFolder:root="{root}/collages"',
        class_names=root / "collages" / "classes.txt",
        training=training,
    )


def _write_pairs(root: Path, pictures: dict[Photo, "Image"]) -> int:
    rows = []
    for photo, picture in pictures.items():
        name = f"photos/{photo.name}.png"
        _save(picture, root / name)
        rows.append((name, photo.title))
        if _is_coloured(picture):
            grey = f"photos/{photo.name}_grey.png"
            _save(picture.convert("L").convert("RGB"), root / grey)
            rows.append((grey, f"{photo.title}, {GREY}"))
    _write_csv(root / "captions.csv", ("path", "caption"), rows)
    return len(rows)


def _write_classes(root: Path, pictures: dict[Photo, "Image"]) -> None:
    rows = [(f"photos/{photo.name}.png", str(i)) for i, photo in enumerate(pictures)]
    _write_csv(root / "classes.csv", ("path", "label"), rows)


def _write_collages(folder: Path, pictures: dict[Photo, "Image"]) -> None:
    """Pairs of photographs side by side, and masks that tell which is where."""
    from PIL import Image

    squares = [picture.crop((0, 0, SHORT_SIDE, SHORT_SIDE)) for picture in pictures.values()]
    for i, left in enumerate(squares):
        j = (i + 1) % len(squares)
        collage = Image.new("RGB", (2 * SHORT_SIDE, SHORT_SIDE))
        collage.paste(left, (0, 0))
        collage.paste(squares[j], (SHORT_SIDE, 0))
        mask = np.full((SHORT_SIDE, 2 * SHORT_SIDE), i, dtype=np.uint8)
        mask[:, SHORT_SIDE:] = j
        _save(collage, folder / "images" / f"{i:02d}.png")
        _save(Image.fromarray(mask), folder / "annotations" / f"{i:02d}.png")
    (folder / "classes.txt").write_text("".join(f"{photo.title}\n" for photo in pictures), encoding="utf-8")


def _is_coloured(picture: "Image") -> bool:
    return bool(np.asarray(picture).std(axis=-1).mean() > 4)


def _save(picture: "Image", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def _write_csv(path: Path, header: tuple[str, str], rows: Sequence[tuple[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see the module's docstring. Returns 0."""
    from dinov3.eval.text import classification, retrieval, segmentation, train_dinotxt

    parser = argparse.ArgumentParser("dinov3.eval.text.example", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for data, training and pictures")
    args, overrides = parser.parse_known_args(argv)
    root: Path = args.output_dir.resolve()
    example = make_example(root / "data")
    run = root / "training"
    train_dinotxt.main([f"trainer_config_file={example.training}", f"output_dir={run}", *overrides])
    newest = max((run / "eval").iterdir(), key=lambda path: int(path.name.rpartition("_")[2]))
    model = [
        f"model.config_file={run}/clip_model_config.yaml",
        f"model.weights={newest}/sharded_model_checkpoint",
        "num_workers=0",
    ]
    sizes = [f"transform.resize_size={int(256 * IMAGE_SIZE / 224)}", f"transform.crop_size={IMAGE_SIZE}"]
    prompts = [f"class_names={example.class_names}", f"templates='{TEMPLATE}'"]
    retrieval.main([f"output_dir={root}/retrieval", f"dataset='{example.captions}'", *model, *sizes])
    classification.main([f"output_dir={root}/classification", f"dataset='{example.classes}'", *model, *sizes, *prompts])
    # The tokens after the head: it narrows them, and everything is trained from scratch, to align those.
    windows = [f"side={IMAGE_SIZE}", f"stride={IMAGE_SIZE // 2}", "resize=0", "patches=head"]
    segmentation.main([f"output_dir={root}/segmentation", f"dataset='{example.masks}'", *model, *prompts, *windows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
