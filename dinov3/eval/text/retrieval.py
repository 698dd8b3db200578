"""Image-text retrieval of a dino.txt model: a script, and what it is made of.

For each caption the images of a data set are ranked, and for each image the captions; recall at k is the part of them
whose partner is among the k nearest:

    python -m dinov3.run.submit dinov3/eval/text/retrieval.py --nodes 1 output_dir=OUT
        model.hub=dinov3_vitl16_dinotxt_tet1280d20h24l dataset=CocoCaptions:split=VAL:root=DIR

Writes `results-retrieval.csv`, and `pictures/` of the images that are nearest to some captions.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.data import make_dataset
from dinov3.eval.config import MISSING, TransformConfig
from dinov3.eval.features import extract_features
from dinov3.eval.helpers import args_dict_to_dataclass, check_eval_arguments, run_main, write_results
from dinov3.eval.pictures import save_panels, spread_indices
from dinov3.eval.text.build_dinotxt import load_for_use
from dinov3.eval.text.config import TextModelConfig
from dinov3.eval.text.data import WithoutTargets, all_captions
from dinov3.eval.text.dinotxt_model import DINOTxt
from dinov3.eval.text.tokenizer import Tokenizer
from dinov3.eval.text.zero_shot import RECALL_AT, retrieval_recall

logger = logging.getLogger("dinov3")

RESULTS_FILENAME = "results-retrieval.csv"
_N_SHOWN = 5


@dataclass
class RetrievalConfig:
    """Configuration of the retrieval."""

    model: TextModelConfig = field(default_factory=TextModelConfig)
    dataset: str = MISSING
    """Dataset string; items are (image, caption), perhaps with several captions an image."""
    transform: TransformConfig = field(default_factory=TransformConfig)
    ks: tuple[int, ...] = RECALL_AT
    """How many of the nearest are looked at."""
    batch_size: int = 256
    """Per process."""
    num_workers: int = 8
    """Of the data loader, per process."""
    n_pictures: int = 8
    """Captions whose nearest images are shown."""
    output_dir: str = ""


class Embedded(NamedTuple):
    """A data set of captions, embedded.

    Attributes:
        images: L2-normalised `[I, D]`.
        texts: L2-normalised `[T, D]`.
        captions: the T texts.
        image_of_text: number of the image of each text.
    """

    images: Tensor
    texts: Tensor
    captions: list[str]
    image_of_text: list[int]


class _Encoder(nn.Module):
    """One of the towers, normalised, as `extract_features` calls it."""

    def __init__(self, model: DINOTxt, method: str) -> None:
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, samples: Tensor) -> Tensor:
        features: Tensor = getattr(self.model, self.method)(samples, normalize=True)
        return features


def embed(model: DINOTxt, tokenizer: Tokenizer, dataset: Any, *, batch_size: int, num_workers: int) -> Embedded:
    """Features of all images and captions of a data set, on every process. A collective of the world.

    Args:
        model: in any mode; it is put into evaluation mode meanwhile.
        tokenizer: of the captions.
        dataset: of (image tensor, caption).
        batch_size, num_workers: of the data loaders, per process.
    """
    captions, image_of_text = all_captions(dataset)
    tokens = tokenizer.tokenize(captions, model.context_length)
    was_training = model.training
    model.eval()
    extract = partial(extract_features, batch_size=batch_size, gather_on_cpu=True)
    images, _ = extract(_Encoder(model, "encode_image"), WithoutTargets(dataset), num_workers=num_workers)
    texts, _ = extract(_Encoder(model, "encode_text"), WithoutTargets(list(zip(tokens))), num_workers=0)
    model.train(was_training)
    return Embedded(images, texts, captions, image_of_text)


def measure_retrieval(
    model: DINOTxt,
    tokenizer: Tokenizer,
    dataset_str: str,
    transform: Any,
    *,
    batch_size: int,
    num_workers: int,
    ks: Sequence[int] = RECALL_AT,
) -> tuple[dict[str, float], Embedded]:
    """Recall in percent by name (`text_to_image_recall@1`, …), and the features. A collective of the world.

    Args:
        model, tokenizer, batch_size, num_workers: see `embed`.
        dataset_str: of captions.
        transform: of the images.
        ks: how many of the nearest are looked at.
    """
    dataset = make_dataset(dataset_str=dataset_str, transform=transform)
    embedded = embed(model, tokenizer, dataset, batch_size=batch_size, num_workers=num_workers)
    return retrieval_recall(embedded.images, embedded.texts, embedded.image_of_text, ks), embedded


def save_pictures(folder: Path, dataset_str: str, embedded: Embedded, n: int) -> None:
    """For captions from all over the data set, a picture of the nearest images; that of the caption has a green bar."""
    dataset = make_dataset(dataset_str=dataset_str)
    for i in spread_indices(len(embedded.captions), n):
        similarity = embedded.images @ embedded.texts[i]
        panels: dict[str, np.ndarray] = {}
        for rank, row in enumerate(similarity.topk(min(_N_SHOWN, len(similarity))).indices.tolist(), start=1):
            image = np.asarray(dataset[row][0].convert("RGB").resize((224, 224))).copy()
            if row == embedded.image_of_text[i]:
                image[-8:] = (40, 160, 60)
            panels[f"{rank}: cosine {similarity[row]:.2f}"] = image
        save_panels(folder / f"caption_{i}.png", panels, title=embedded.captions[i][:120])


def benchmark_launcher(eval_args: Mapping[str, Any]) -> dict[str, float]:
    """Evaluate as the parsed arguments say, write the results, and return them."""
    config, output_dir = args_dict_to_dataclass(eval_args, RetrievalConfig)
    model, make_transform, tokenizer = load_for_use(config.model)
    results, embedded = measure_retrieval(
        model,
        tokenizer,
        config.dataset,
        make_transform(resize_size=config.transform.resize_size, crop_size=config.transform.crop_size),
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        ks=config.ks,
    )
    logger.info("results: %s", results)
    write_results(results, output_dir, RESULTS_FILENAME)
    if distributed.is_main_process():
        save_pictures(Path(output_dir) / "pictures", config.dataset, embedded, config.n_pictures)
    return results


check_arguments = partial(check_eval_arguments, RetrievalConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see the module's docstring. Returns 0."""
    return run_main(argv, benchmark_launcher, RetrievalConfig)


if __name__ == "__main__":
    sys.exit(main())
