"""k-NN classification on frozen features: a script, and what it is made of.

The neighbours of a test image among the features of a labelled train set vote on its class:

    python dinov3/eval/knn.py output_dir=<OUT> train.dataset=<STRING> eval.test_dataset=<STRING>
        model.config_file=<OUT>/config.yaml model.pretrained_weights=<OUT>/teacher_checkpoint.pth

The search and the vote are in `dinov3.models.neighbours`.
"""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.data import make_classification_eval_transform, make_dataset
from dinov3.data.transforms import CROP_DEFAULT_SIZE, RESIZE_DEFAULT_SIZE, get_target_transform
from dinov3.eval.config import MISSING, FewShotConfig, ModelConfig, TransformConfig
from dinov3.eval.data import create_train_dataset_dict, get_class_names, get_num_classes, report_skipped
from dinov3.eval.features import extract_subsets, on_device_if_it_fits
from dinov3.eval.helpers import args_dict_to_dataclass, check_eval_arguments, run_main, write_results
from dinov3.eval.metrics import ClassificationMetricType, build_classification_metric
from dinov3.eval.metrics.confusion import ClassPairs
from dinov3.eval.result_figures import ResultFigures
from dinov3.eval.setup import autocast_context, load_model_and_context
from dinov3.eval.utils import (
    ModelWithNormalize,
    average_metrics,
    evaluate,
    make_eval_data_loader,
    save_results,
)
from dinov3.models.neighbours import nearest_neighbours, neighbour_vote
from dinov3.utils.device import default_device
from dinov3.utils.dtype import as_torch_dtype, resolve_compute_dtype

logger = logging.getLogger("dinov3")

RESULTS_FILENAME = "results-knn.csv"
MAIN_METRICS = [".* Top 1"]
_JSON_FILENAME = "results_eval_knn.json"


@dataclass
class TrainConfig:
    """The labelled samples among which neighbours are searched."""

    dataset: str = MISSING
    """Dataset string."""
    batch_size: int = 256
    """Per process."""
    num_workers: int = 5
    """Of the data loader, per process."""
    ks: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours that vote."""
    temperature: float = 0.07
    """Of the softmax over similarities."""
    skip_first_nn: bool = False
    """Leave out the nearest neighbour: for test samples that are in the train set."""
    similarity_dtype: str | None = None
    """What similarities are computed in: fp32, bf16 or fp16; null: what the model runs in."""


@dataclass
class EvalConfig:
    """The samples that are classified."""

    test_dataset: str = MISSING
    """Dataset string."""
    test_metric_type: ClassificationMetricType = ClassificationMetricType.MEAN_ACCURACY
    """What is measured."""
    batch_size: int | None = None
    """Per process; null: that of the train set."""
    num_workers: int = 5
    """Of the data loader, per process."""


@dataclass
class KnnEvalConfig:
    """Configuration of the k-NN evaluation."""

    model: ModelConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    transform: TransformConfig = field(default_factory=TransformConfig)
    few_shot: FewShotConfig = field(default_factory=FewShotConfig)
    save_results: bool = False
    """Write predictions and targets of all test samples."""
    output_dir: str = ""


class KnnModule(nn.Module):
    """Weighted k-NN classifier over a train set that is held in memory.

    The train features go to `device` if they leave half of its free memory; otherwise they stay where they are, and
    every search moves them block by block. `forward` doesn't wait for other processes.

    Args:
        train_features: L2-normalised, `[N, D]`.
        train_labels: class numbers, int64 `[N]`, or multi-hot rows `[N, C]`.
        device: where queries come from.
        ks: numbers of neighbours that vote.
        T: temperature of the softmax over similarities.
        num_classes: C of single labels.
        skip_first_nn: leave out the nearest neighbour.
        similarity_dtype: what similarities are computed in; None: the dtype of the queries, or that of autocast.

    Raises:
        ValueError: no k, labels that don't fit the features, or labels beyond `num_classes`.
    """

    def __init__(
        self,
        *,
        train_features: Tensor,
        train_labels: Tensor,
        device: torch.device | str,
        ks: Sequence[int],
        T: float,
        num_classes: int = 1000,
        skip_first_nn: bool = False,
        similarity_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not ks or min(ks) < 1:
            raise ValueError(f"ks must hold numbers of neighbours of at least 1, got {list(ks)}")
        if len(train_labels) != len(train_features):
            raise ValueError(f"got {len(train_labels)} labels for {len(train_features)} train features")
        if train_labels.ndim == 1 and len(train_labels) and int(train_labels.max()) >= num_classes:
            raise ValueError(f"got num_classes={num_classes}, but a label {int(train_labels.max())}")
        self.ks = sorted(set(ks))
        self.temperature = T
        self.num_classes = num_classes if train_labels.ndim == 1 else train_labels.shape[1]
        self.skip_first_nn = skip_first_nn
        self.similarity_dtype = similarity_dtype
        self.train_features = on_device_if_it_fits(train_features, torch.device(device), similarity_dtype)
        self.train_labels = train_labels.to(device)

    def compute_neighbors(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities, float32 `[B, K]`, and labels, `[B, K]` or `[B, K, C]`, of all neighbours that are searched for.

        K is the largest k, plus one if the first is going to be skipped, at most the size of the train set.
        """
        found = self._search(features)
        return found.similarities, self.train_labels[found.indices]

    def forward(self, features: Tensor) -> dict[int, Tensor]:
        """Class scores of features `[B, D]`: `{k: [B, C]}`, float32."""
        found = self._search(features)
        if self.skip_first_nn:
            found = found._replace(similarities=found.similarities[:, 1:], indices=found.indices[:, 1:])
        return neighbour_vote(
            found, self.train_labels, self.ks, temperature=self.temperature, num_classes=self.num_classes
        )

    def _search(self, features: Tensor) -> Any:
        return nearest_neighbours(
            features, self.train_features, max(self.ks) + int(self.skip_first_nn), dtype=self.similarity_dtype
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see the module's docstring. Returns 0."""
    return run_main(argv, benchmark_launcher, KnnEvalConfig)


check_arguments = partial(check_eval_arguments, KnnEvalConfig)


def benchmark_launcher(eval_args: Mapping[str, Any]) -> dict[str, float]:
    """Evaluate as the parsed arguments say, write the results, and return them."""
    config, output_dir = args_dict_to_dataclass(eval_args, KnnEvalConfig)
    model, context = load_model_and_context(
        config.model,
        output_dir,
        allow_unknown_keys=bool(eval_args.get("allow_unknown_keys")),
        datasets=(config.train.dataset, config.eval.test_dataset),
    )
    results = eval_knn_with_model(model=model, autocast_dtype=context["autocast_dtype"], config=config)
    write_results(results, output_dir, RESULTS_FILENAME)
    return results


def eval_knn_with_model(*, model: nn.Module, autocast_dtype: torch.dtype, config: KnnEvalConfig) -> dict[str, float]:
    """Classify a test set by the neighbours of its features in a train set.

    Args:
        model: gives features `[B, D]`; where its parameters are, everything is computed.
        autocast_dtype: what the model runs in.
        config: what to evaluate.

    Returns:
        Metrics times 100 by name: `"<k> Top 1"`, and `"<k> Top 5"` if there are 5 classes or more; with several
        few-shot tries their means. They are also appended to `results_eval_knn.json` in the output directory.

    Raises:
        ValueError: a metric that isn't a number, or data sets that don't fit it.
    """
    if config.eval.test_metric_type is ClassificationMetricType.PER_CLASS_ACCURACY:
        raise ValueError("PER_CLASS_ACCURACY is a vector, not a number: use MEAN_PER_CLASS_ACCURACY")
    device = default_device()
    normalized = ModelWithNormalize(model).to(device).eval()
    transform = _make_transform(config.transform)
    train_dataset, test_dataset = (
        make_dataset(dataset_str=name, transform=transform, target_transform=get_target_transform(name))
        for name in (config.train.dataset, config.eval.test_dataset)
    )
    report_skipped(train_dataset, config.output_dir, "train")
    report_skipped(test_dataset, config.output_dir, "test")
    num_classes = get_num_classes(train_dataset)
    few_shot = config.few_shot
    subsets = create_train_dataset_dict(train_dataset, few_shot.enable, few_shot.k_or_percent, few_shot.n_tries)
    with autocast_context(device, autocast_dtype):
        train_sets = extract_subsets(
            normalized, train_dataset, subsets, config.train.batch_size, config.train.num_workers
        )
        dtype = resolve_compute_dtype(as_torch_dtype(config.train.similarity_dtype or autocast_dtype), device)
        classifier = _KnnOnModel(normalized, _make_knn_modules(train_sets, config, device, dtype, num_classes))
        keys = [(t, k) for t, knn in classifier.knn_modules.items() for k in knn.ks]
        first_try = next(iter(classifier.knn_modules))
        drawn = [_Pairs(t, k) for t, k in keys if t == first_try]
        metric_type = config.eval.test_metric_type
        _, metrics, samples = evaluate(
            classifier,
            make_eval_data_loader(
                dataset=test_dataset,
                batch_size=config.eval.batch_size or config.train.batch_size,
                num_workers=config.eval.num_workers,
                metric_type=metric_type,
            ),
            {key: partial(_scores_and_targets, tuple(key)) for key in (*keys, *drawn)},
            {
                key: build_classification_metric(metric_type, num_classes=num_classes, dataset=test_dataset)
                for key in keys
            }
            | {key: ClassPairs(num_classes) for key in drawn},
            device,
            accumulate_results=config.save_results,
        )
    results = _summarize({key: metrics[key] for key in keys})
    _draw(results, {key.k: metrics[key]["pairs"] for key in drawn}, num_classes, train_dataset, config.output_dir)
    if distributed.is_main_process():
        _append_json_lines(results, Path(config.output_dir))
        if config.save_results:
            _save_samples({key: samples[key] for key in keys}, config.output_dir, n_tries=len(train_sets))
    return results


def _make_transform(config: TransformConfig) -> Any:
    if (config.resize_size, config.crop_size) != (RESIZE_DEFAULT_SIZE, CROP_DEFAULT_SIZE):
        logger.warning(
            "resize %d, crop %d: published k-NN numbers are for %d and %d",
            *(config.resize_size, config.crop_size, RESIZE_DEFAULT_SIZE, CROP_DEFAULT_SIZE),
        )
    return make_classification_eval_transform(resize_size=config.resize_size, crop_size=config.crop_size)


def _make_knn_modules(
    train_sets: Mapping[int, tuple[Tensor, Tensor]],
    config: KnnEvalConfig,
    device: torch.device,
    dtype: torch.dtype,
    num_classes: int,
) -> dict[int, KnnModule]:
    # Selections of multi-label data may differ a little in size; their averages need the same numbers of neighbours.
    smallest = min(len(labels) for _, labels in train_sets.values())
    return {
        t: KnnModule(
            train_features=features,
            train_labels=labels,
            device=device,
            ks=sorted({min(k, smallest) for k in config.train.ks}),
            T=config.train.temperature,
            num_classes=num_classes,
            skip_first_nn=config.train.skip_first_nn,
            similarity_dtype=dtype,
        )
        for t, (features, labels) in train_sets.items()
    }


class _KnnOnModel(nn.Module):
    """Images to `{(try, k): class scores}`: the features are computed once for all tries."""

    def __init__(self, model: nn.Module, knn_modules: dict[int, KnnModule]) -> None:
        super().__init__()
        self.model = model
        self.knn_modules = knn_modules

    def forward(self, samples: Tensor) -> dict[tuple[int, int], Tensor]:
        features = self.model(samples)
        return {(t, k): scores for t, knn in self.knn_modules.items() for k, scores in knn(features).items()}


def _scores_and_targets(key: tuple[Any, ...], outputs: Any, targets: Tensor) -> dict[str, Tensor]:
    return {"preds": outputs[key[:2]], "target": targets}


def _draw(
    results: Mapping[str, float], pairs: Mapping[int, Tensor], num_classes: int, dataset: Any, output_dir: str
) -> None:
    """Tables and plots: accuracy per k; what the best k of the first try confuses."""
    figures = ResultFigures(output_dir, Path(RESULTS_FILENAME).stem)
    lines: dict[str, dict[float, float]] = {}
    for name, value in results.items():
        k, _, metric = name.partition(" ")
        lines.setdefault(metric, {})[int(k)] = value
    top_1 = next(iter(lines.values()))
    figures.add_table("k-NN", [{"k": k, **{metric: points[k] for metric, points in lines.items()}} for k in top_1])
    best = max(pairs, key=lambda k: top_1[k])
    figures.add_accuracies("accuracy_per_k.png", "k-NN", lines, x_label="neighbours k")
    names = get_class_names(dataset, num_classes)
    figures.add_confusion("confusion.png", f"k-NN, k = {best}", pairs[best], num_classes, names)
    figures.write()


class _Pairs(NamedTuple):
    """Key of the metric that counts what is taken for what; another one than that of the accuracy."""

    t: int
    k: int
    what: str = "pairs"


def _summarize(metrics: Mapping[tuple[int, int], Mapping[str, Tensor]]) -> dict[str, float]:
    """Percentages by name; means over the tries, if there are several."""
    by_try: dict[int, dict[str, float]] = {}
    for (t, k), values in metrics.items():
        named = {f"{k} {name.replace('top-', 'Top ')}": 100.0 * value.item() for name, value in values.items()}
        by_try.setdefault(t, {}).update(named)
    if len(by_try) == 1:
        results = by_try[0]
    else:
        averages = average_metrics(by_try)
        results = {name: averages[f"{name}_mean"] for name in by_try[0]}
        for name in results:
            logger.info("%s: standard deviation over %d tries %.2f", name, len(by_try), averages[f"{name}_std"])
    for name, value in results.items():
        logger.info("%s: %.2f", name, value)
    return results


def _append_json_lines(results: Mapping[str, float], output_dir: Path) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / _JSON_FILENAME, "a", encoding="utf-8") as file:
        for name, value in results.items():
            file.write(json.dumps({name: value}) + "\n")


def _save_samples(samples: Mapping[tuple[int, int], Any], output_dir: str, n_tries: int) -> None:
    for (t, k), found in samples.items():
        suffix = f"k_{k}" if n_tries == 1 else f"try_{t}_k_{k}"
        save_results(found["preds"], found["target"], output_dir, filename_suffix=suffix)


if __name__ == "__main__":
    sys.exit(main())
