"""Zero-shot classification with a dino.txt model: a script, and what it is made of.

Each class is the mean of the texts that templates make of its name; an image belongs to the nearest:

    python -m dinov3.run.submit dinov3/eval/text/classification.py --nodes 1 output_dir=OUT
        model.hub=dinov3_vitl16_dinotxt_tet1280d20h24l class_names=open_clip
        dataset=ImageNet:split=VAL:root=DIR:extra=DIR

Writes `results-zero-shot-classification.csv`, and `pictures/` of some images with the five nearest classes.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.data import make_dataset
from dinov3.eval.config import MISSING, TransformConfig
from dinov3.eval.evaluate import evaluate, make_eval_data_loader
from dinov3.eval.helpers import args_dict_to_dataclass, check_eval_arguments, run_main, write_results
from dinov3.eval.metrics import ClassificationMetricType, build_classification_metric
from dinov3.eval.pictures import save_panels, spread_indices
from dinov3.eval.text.build_dinotxt import load_for_use
from dinov3.eval.text.config import TextModelConfig
from dinov3.eval.text.dinotxt_model import DINOTxt
from dinov3.eval.text.prompts import DATASET, OPEN_CLIP, find_class_names, find_templates
from dinov3.eval.text.tokenizer import Tokenizer
from dinov3.eval.text.zero_shot import class_vectors, classify

logger = logging.getLogger("dinov3")

RESULTS_FILENAME = "results-zero-shot-classification.csv"
_METRIC = ClassificationMetricType.MEAN_ACCURACY
_N_SHOWN = 5


@dataclass
class ZeroShotClassificationConfig:
    """Configuration of zero-shot classification."""

    model: TextModelConfig = field(default_factory=TextModelConfig)
    dataset: str = MISSING
    """Dataset string; items are (image, class index)."""
    class_names: str = DATASET
    """dataset: those of the data set; open_clip: of ImageNet-1k, from that package; else a file, one a line."""
    first_synonym: bool = False
    """Of names that list several, take the first."""
    templates: str = OPEN_CLIP
    """open_clip: CLIP's 80, from that package; one template ("a photo of a {}."); else a file, one a line."""
    transform: TransformConfig = field(default_factory=lambda: TransformConfig(resize_size=512, crop_size=512))
    batch_size: int = 64
    """Per process."""
    num_workers: int = 8
    """Of the data loader, per process."""
    n_pictures: int = 8
    """Images that are shown with their nearest classes."""
    output_dir: str = ""


class ZeroShotClassifier(nn.Module):
    """From images `[B, 3, H, W]` to logits `[B, K]`.

    Args:
        model: in evaluation mode.
        classes: unit vectors `[K, D]`, see `class_vectors`.
    """

    classes: Tensor

    def __init__(self, model: DINOTxt, classes: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("classes", classes, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return classify(self.model, images, self.classes)


def make_classifier(
    model: DINOTxt, tokenizer: Tokenizer, class_names: Sequence[str], templates: Sequence[str]
) -> ZeroShotClassifier:
    """The classifier of these classes; see `class_vectors`."""
    tokenize = partial(tokenizer.tokenize, context_length=model.context_length)
    return ZeroShotClassifier(model, class_vectors(model, tokenize, class_names, templates))


def measure_accuracy(
    classifier: ZeroShotClassifier, dataset: Any, *, batch_size: int, num_workers: int
) -> dict[str, float]:
    """`top-1` and `top-5` accuracy in percent (the latter of five classes or more). A collective of the world."""
    n_classes = len(classifier.classes)
    metric = build_classification_metric(_METRIC, num_classes=n_classes, dataset=dataset)
    loader = make_eval_data_loader(dataset=dataset, batch_size=batch_size, num_workers=num_workers, metric_type=_METRIC)
    _, results, _ = evaluate(
        classifier,
        loader,
        {"": lambda outputs, targets: {"preds": outputs, "target": targets}},
        {"": metric},
        classifier.classes.device,
    )
    return {name: 100.0 * value.item() for name, value in results[""].items()}


def save_pictures(
    folder: Path, classifier: ZeroShotClassifier, dataset: Any, shown: Any, class_names: Sequence[str], n: int
) -> None:
    """Images from all over the data set, each with the nearest classes; `shown` is the data set without transform."""
    for i in spread_indices(len(dataset), n):
        tensor, target = dataset[i]
        probabilities = classifier(tensor[None].to(classifier.classes.device)).softmax(dim=1)[0].cpu()
        best = probabilities.topk(min(_N_SHOWN, len(class_names)))
        lines = [f"{class_names[k]} {p:.0%}" for p, k in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        truth = "" if target is None else f"{class_names[int(target)]}:\n"
        image = np.asarray(shown[i][0].convert("RGB"))
        save_panels(folder / f"image_{i}.png", {f"{truth}" + "\n".join(lines): image})


@torch.no_grad()
def benchmark_launcher(eval_args: Mapping[str, Any]) -> dict[str, float]:
    """Evaluate as the parsed arguments say, write the results, and return them."""
    config, output_dir = args_dict_to_dataclass(eval_args, ZeroShotClassificationConfig)
    shown = make_dataset(dataset_str=config.dataset)
    class_names = find_class_names(config.class_names, shown, first_synonym=config.first_synonym)
    templates = find_templates(config.templates)
    model, make_transform, tokenizer = load_for_use(config.model)
    transform = make_transform(resize_size=config.transform.resize_size, crop_size=config.transform.crop_size)
    dataset = make_dataset(dataset_str=config.dataset, transform=transform)
    classifier = make_classifier(model, tokenizer, class_names, templates)
    accuracies = measure_accuracy(classifier, dataset, batch_size=config.batch_size, num_workers=config.num_workers)
    results = {f"{config.dataset}_{name}": value for name, value in accuracies.items()}
    logger.info("results: %s", results)
    write_results(results, output_dir, RESULTS_FILENAME)
    if distributed.is_main_process():
        save_pictures(Path(output_dir) / "pictures", classifier, dataset, shown, class_names, config.n_pictures)
    return results


check_arguments = partial(check_eval_arguments, ZeroShotClassificationConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see the module's docstring. Returns 0."""
    return run_main(argv, benchmark_launcher, ZeroShotClassificationConfig)


if __name__ == "__main__":
    sys.exit(main())
