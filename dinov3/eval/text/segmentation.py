"""Open-vocabulary segmentation with a dino.txt model: a script, and what it is made of.

Each class is a text; each patch belongs to the class that is nearest to it:

    python -m dinov3.run.submit dinov3/eval/text/segmentation.py --nodes 1 output_dir=OUT
        model.hub=dinov3_vitl16_dinotxt_tet1280d20h24l dataset=ADE20K:split=VAL:root=DIR
        class_names=DIR/objectInfo150.txt first_synonym=true reduce_zero_label=true

Writes `results-zero-shot-segmentation.csv` (mean intersection over union in percent), the same per class in
`results-zero-shot-segmentation-classes.csv`, and `pictures/` of some images with their segmentation.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from dinov3 import distributed
from dinov3.data import make_dataset
from dinov3.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from dinov3.eval.config import MISSING
from dinov3.eval.helpers import args_dict_to_dataclass, check_eval_arguments, run_main, write_results
from dinov3.eval.pictures import as_picture, colour_labels, overlay, palette, save_panels, spread_indices
from dinov3.eval.results import save_from_dict
from dinov3.eval.text.build_dinotxt import load_for_use
from dinov3.eval.text.config import TextModelConfig
from dinov3.eval.text.dinotxt_model import DINOTxt
from dinov3.eval.text.prompts import DATASET, OPEN_CLIP, find_class_names, find_templates
from dinov3.eval.text.zero_shot import Patches, class_vectors, predict_slide, predict_whole, resize_short_side, upsample

logger = logging.getLogger("dinov3")

RESULTS_FILENAME = "results-zero-shot-segmentation.csv"
CLASSES_FILENAME = "results-zero-shot-segmentation-classes.csv"
IGNORED = 255


@dataclass
class ZeroShotSegmentationConfig:
    """Configuration of open-vocabulary segmentation."""

    model: TextModelConfig = field(default_factory=TextModelConfig)
    dataset: str = MISSING
    """Dataset string; items are (image, mask of class indices, 255 for ignored pixels)."""
    reduce_zero_label: bool = False
    """Label 0 becomes ignored and all others one less, as ADE20K needs it."""
    class_names: str = DATASET
    """dataset: those of the data set; else a file, one a line, in the order of the class indices."""
    first_synonym: bool = False
    """Of names that list several, take the first."""
    templates: str = OPEN_CLIP
    """open_clip: CLIP's 80, from that package; one template ("a photo of a {}."); else a file, one a line."""
    patches: str = "backbone"
    """Patch tokens of the backbone, as the reference compares; or after the `head`: their mean is aligned to texts."""
    mode: str = "slide"
    """slide: windows, averaged; whole: the image at once."""
    resize: int = 512
    """Shorter side of the images in pixels; 0: as they are."""
    side: int = 384
    """Of the windows in pixels."""
    stride: int = 192
    """Between windows in pixels."""
    num_workers: int = 4
    """Of the data loader, per process."""
    n_pictures: int = 8
    """Images that are shown with their segmentation."""
    output_dir: str = ""


def segment(
    model: DINOTxt,
    image: Any,
    classes: Tensor,
    *,
    size: tuple[int, int] | None = None,
    patches: Patches = "backbone",
    mode: str = "slide",
    resize: int = 512,
    side: int = 384,
    stride: int = 192,
) -> Tensor:
    """The nearest class of each pixel, int64 `[H, W]`.

    Args:
        model: in evaluation mode.
        image: Pillow image.
        classes: patch-level unit vectors `[K, D]`, see `class_vectors`.
        size: (height, width) of the result; default: those of the image.
        patches: see `predict_whole`.
        mode: "slide" (windows, see `predict_slide`) or "whole".
        resize: length of the shorter side that the model sees (bicubic), in pixels; 0: as the image is.
        side, stride: of the windows, in pixels.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in ("slide", "whole"):
        raise ValueError(f"mode is 'slide' or 'whole', got {mode!r}")
    tensor = _to_tensor(image, resize, model).to(model.logit_scale.device)
    if mode == "whole":
        scores = predict_whole(model, tensor, classes, patches=patches)
    else:
        scores = predict_slide(model, tensor, classes, side, stride, patches=patches)
    return upsample(scores, size or (image.height, image.width)).argmax(dim=0)


def _to_tensor(image: Any, resize: int, model: DINOTxt) -> Tensor:
    """The image resized and normalised, `[3, H, W]`."""
    from PIL import Image

    height, width = resize_short_side((image.height, image.width), resize) if resize else (image.height, image.width)
    pixels = np.array(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    mean, std = getattr(model, "normalization", (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    scaled = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    return (scaled - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def confusion(prediction: Tensor, truth: Tensor, n_classes: int) -> Tensor:
    """How often pixels of a true class (rows) were predicted as a class (columns), int64 `[K, K]`; 255 is left out.

    Raises:
        ValueError: a true class that isn't there.
    """
    counted = truth != IGNORED
    truth, prediction = truth[counted].long(), prediction[counted].long()
    if len(truth) and int(truth.max()) >= n_classes:
        raise ValueError(f"a mask has the class {int(truth.max())}, there are {n_classes} class names")
    return torch.bincount(truth * n_classes + prediction, minlength=n_classes**2).view(n_classes, n_classes)


def intersection_over_union(matrix: Tensor) -> Tensor:
    """Per class in percent, float64 `[K]`; NaN for a class that neither was there nor was predicted."""
    matrix = matrix.double()
    intersection = matrix.diagonal()
    return 100.0 * intersection / (matrix.sum(0) + matrix.sum(1) - intersection)


def _truth(mask: Any, reduce_zero_label: bool) -> Tensor:
    """A mask as int64 `[H, W]`."""
    labels = torch.from_numpy(np.array(mask)).long().squeeze()
    if reduce_zero_label:
        labels = torch.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)
    return labels


def _first(batch: list[Any]) -> Any:
    return batch[0]


def benchmark_launcher(eval_args: Mapping[str, Any]) -> dict[str, float]:
    """Evaluate as the parsed arguments say, write the results, and return them."""
    config, output_dir = args_dict_to_dataclass(eval_args, ZeroShotSegmentationConfig)
    dataset = make_dataset(dataset_str=config.dataset)
    class_names = find_class_names(config.class_names, dataset, first_synonym=config.first_synonym)
    templates = find_templates(config.templates)
    model, _, tokenizer = load_for_use(config.model)
    tokenize = partial(tokenizer.tokenize, context_length=model.context_length)
    classes = class_vectors(model, tokenize, class_names, templates, patch_level=True)
    own = range(distributed.get_rank(), len(dataset), distributed.get_world_size())
    shown = spread_indices(len(dataset), config.n_pictures)
    matrix = torch.zeros(len(class_names), len(class_names), dtype=torch.int64, device=classes.device)
    loader = DataLoader(Subset(dataset, list(own)), batch_size=1, collate_fn=_first, num_workers=config.num_workers)
    for i, (image, mask) in zip(own, loader, strict=True):
        truth = _truth(mask, config.reduce_zero_label)
        prediction = segment(
            model,
            image,
            classes,
            size=(truth.shape[0], truth.shape[1]),
            patches=cast(Patches, config.patches),
            mode=config.mode,
            resize=config.resize,
            side=config.side,
            stride=config.stride,
        )
        matrix += confusion(prediction, truth.to(prediction.device), len(class_names))
        if i in shown:
            save_picture(Path(output_dir) / "pictures" / f"image_{i}.png", image, truth, prediction, class_names)
    if distributed.get_world_size() > 1:
        torch.distributed.all_reduce(matrix)
    per_class = intersection_over_union(matrix.cpu())
    results = {f"{config.dataset}_mIoU": per_class.nanmean().item()}
    logger.info("results: %s", results)
    write_results(results, output_dir, RESULTS_FILENAME)
    if distributed.is_main_process():
        table = {"class": class_names, "iou": per_class.tolist(), "n_pixels": matrix.sum(1).tolist()}
        save_from_dict(table, Path(output_dir) / CLASSES_FILENAME)
    return results


def save_picture(path: Path, image: Any, truth: Tensor, prediction: Tensor, class_names: Sequence[str]) -> None:
    """Image, truth and prediction side by side, with a legend of the classes that are there."""
    colours = palette(len(class_names))
    pixels = as_picture(image.convert("RGB").resize((truth.shape[1], truth.shape[0])))
    there = sorted((set(truth.unique().tolist()) | set(prediction.unique().tolist())) - {IGNORED})
    panels = {
        "image": pixels,
        "truth": overlay(pixels, colour_labels(truth, colours)),
        "prediction": overlay(pixels, colour_labels(prediction, colours)),
    }
    save_panels(path, panels, legend={class_names[k]: colours[k] for k in there})


check_arguments = partial(check_eval_arguments, ZeroShotSegmentationConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see the module's docstring. Returns 0."""
    return run_main(argv, benchmark_launcher, ZeroShotSegmentationConfig)


if __name__ == "__main__":
    sys.exit(main())
