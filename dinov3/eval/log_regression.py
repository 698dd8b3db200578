"""Logistic regression on frozen features: a script, and what it is made of.

For 45 strengths of the L2 penalty a classifier is trained on the features of the train set; the one that is best on a
validation set is trained again, with the validation samples, and tested:

    python dinov3/eval/log_regression.py output_dir=<OUT> train.dataset=<STRING> eval.test_dataset=<STRING>
        model.config_file=<OUT>/config.yaml model.pretrained_weights=<OUT>/teacher_checkpoint.pth

The solver is in `dinov3.eval.logistic`.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.data import make_classification_eval_transform, make_dataset
from dinov3.data.transforms import get_target_transform
from dinov3.eval.accumulators import ResultsAccumulator
from dinov3.eval.config import MISSING, FewShotConfig, ModelConfig, TransformConfig
from dinov3.eval.data import (
    create_train_dataset_dict,
    get_class_names,
    get_num_classes,
    report_skipped,
    split_train_val_datasets,
)
from dinov3.eval.features import extract_features, extract_subsets, on_device_if_it_fits
from dinov3.eval.helpers import args_dict_to_dataclass, check_eval_arguments, run_main, write_results
from dinov3.eval.logistic import LogisticModel, LogisticRegression, SklearnLogisticRegression
from dinov3.eval.metrics import ClassificationMetricType, build_classification_metric
from dinov3.eval.metrics.confusion import ClassPairs
from dinov3.eval.result_figures import ResultFigures
from dinov3.eval.setup import autocast_context, load_model_and_context
from dinov3.eval.utils import average_metrics, save_results
from dinov3.utils.device import default_device
from dinov3.utils.dtype import as_torch_dtype

logger = logging.getLogger("dinov3")

RESULTS_FILENAME = "results-log-regression.csv"
MAIN_METRICS = ["top-1(_mean)?"]
C_POWER_RANGE = torch.linspace(-6, 5, 45)
"""Exponents of ten of the values of C, the inverse strength of the penalty."""

_VALIDATION_PART, _VALIDATION_PART_FEW_SHOT = 0.1, 0.01


@dataclass
class TrainConfig:
    """What the classifiers are trained on, and how."""

    dataset: str = MISSING
    """Dataset string."""
    val_dataset: str | None = None
    """Dataset string; null: a tenth of the train set (a hundredth, with few-shot evaluation)."""
    val_metric_type: ClassificationMetricType = ClassificationMetricType.MEAN_ACCURACY
    """What chooses C."""
    batch_size: int = 256
    """Per process."""
    num_workers: int = 5
    """Of the data loader, per process."""
    tol: float = 1e-12
    """Largest entry of the gradient at which the solver stops."""
    train_features_device: str = "cpu"
    """Where the features are kept."""
    train_dtype: str = "float64"
    """Precision of the solution: float64 or float32."""
    max_train_iters: int = 1000
    """Iterations of the solver, at most."""
    solver: str = "lbfgs"
    """`lbfgs`: this package's, on the accelerator if there is one; `sklearn`: scikit-learn's."""


@dataclass
class EvalConfig:
    """The samples that are classified."""

    test_dataset: str = MISSING
    """Dataset string."""
    batch_size: int | None = None
    """Per process; null: that of the train set."""
    num_workers: int = 5
    """Of the data loader, per process."""
    test_metric_type: ClassificationMetricType | None = None
    """What is measured; null: what chooses C."""


@dataclass
class LogregEvalConfig:
    """Configuration of the logistic-regression evaluation."""

    model: ModelConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    transform: TransformConfig = field(default_factory=lambda: TransformConfig(resize_size=224))
    few_shot: FewShotConfig = field(default_factory=FewShotConfig)
    save_results: bool = False
    """Write predictions and targets of all test samples."""
    output_dir: str = ""


class LogRegModule(nn.Module):
    """A logistic regression with an L2 penalty.

    Args:
        C: inverse strength of the penalty.
        max_iter: iterations of the solver, at most.
        dtype: precision of the solution, float64 or float32.
        tol: largest entry of the gradient at which the solver stops.
        num_classes: columns of the probabilities; default: as many as the labels show.
        solver: `"lbfgs"` or `"sklearn"`.
    """

    def __init__(
        self,
        C: float,
        max_iter: int = 1000,
        dtype: torch.dtype = torch.float64,
        *,
        tol: float = 1e-12,
        num_classes: int | None = None,
        solver: str = "lbfgs",
    ) -> None:
        super().__init__()
        self.C, self.max_iter, self.dtype, self.tol = C, max_iter, dtype, tol
        self.num_classes, self.solver = num_classes, solver
        self.model: LogisticModel | None = None

    def fit(self, train_features: Tensor, train_labels: Tensor) -> Self:
        """Train on features `[N, D]` and class numbers `[N]` or multi-hot rows `[N, K]`; return this module."""
        problem = _make_problem(self.solver, train_features, train_labels, self.num_classes, self.dtype)
        self.model = problem.fit(self.C, tolerance=self.tol, max_iterations=self.max_iter)
        return self

    def forward(self, samples: Tensor) -> Tensor:
        """Probabilities of features `[N, D]`, float64 `[N, K]`."""
        if self.model is None:
            raise RuntimeError("this logistic regression isn't trained yet: call fit")
        return self.model.predict_proba(samples)


def _make_problem(
    solver: str, features: Tensor, labels: Tensor, num_classes: int | None, dtype: torch.dtype
) -> LogisticRegression | SklearnLogisticRegression:
    if solver == "sklearn":
        return SklearnLogisticRegression(features, labels, num_classes=num_classes, dtype=dtype)
    if solver != "lbfgs":
        raise ValueError(f"train.solver must be lbfgs or sklearn, got {solver!r}")
    device = default_device()
    if device.type == "mps":  # has no float64
        device = torch.device("cpu")
    resident = on_device_if_it_fits(features, device)
    return LogisticRegression(resident, labels, num_classes=num_classes, dtype=dtype, device=device)


def train_for_C(
    *,
    C: float,
    max_iter: int,
    train_features: Tensor,
    train_labels: Tensor,
    dtype: torch.dtype = torch.float64,
    tol: float = 1e-12,
    num_classes: int | None = None,
    solver: str = "lbfgs",
) -> LogRegModule:
    """A trained `LogRegModule`; see there."""
    module = LogRegModule(C, max_iter, dtype, tol=tol, num_classes=num_classes, solver=solver)
    return module.fit(train_features, train_labels)


def sweep_C_values(
    *,
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    val_metric_type: ClassificationMetricType,
    num_classes: int,
    train_dtype: torch.dtype = torch.float64,
    tol: float = 1e-12,
    max_train_iters: int = 1000,
    solver: str = "lbfgs",
) -> dict[float, dict[str, float]]:
    """Validation metrics for each C of `10 ** C_POWER_RANGE`, ascending. A collective of the world.

    The values of C are shared out among the processes; each of them solves its own in ascending order and starts from
    its previous solution.

    Args:
        train_features, train_labels: as for `LogRegModule.fit`.
        val_features, val_labels: what the metric is taken on, all of it on every process.
        val_metric_type: the metric.
        num_classes: columns of the probabilities.
        train_dtype, tol, max_train_iters, solver: as for `LogRegModule`.
    """
    values = (10**C_POWER_RANGE).tolist()
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    problem = _make_problem(solver, train_features, train_labels, num_classes, train_dtype)
    measured: dict[int, dict[str, float]] = {}
    model: LogisticModel | None = None
    for i in range(rank, len(values), world_size):
        model = problem.fit(values[i], tolerance=tol, max_iterations=max_train_iters, start=model)
        metric = build_classification_metric(val_metric_type, num_classes=num_classes)
        metric.synchronized = False  # every process measures other models, on all validation samples
        probabilities = model.predict_proba(val_features)
        metric.to(probabilities.device).update(probabilities, val_labels.to(probabilities.device))
        measured[i] = {name: value.item() for name, value in metric.compute().items()}
        logger.info("C=%.3g: %s", values[i], ", ".join(f"{name} {v:.4f}" for name, v in measured[i].items()))
    everybody: list[Any] = [measured]
    if world_size > 1:
        everybody = [None] * world_size
        torch.distributed.all_gather_object(everybody, measured)
    merged = {i: metrics for part in everybody for i, metrics in part.items()}
    return {values[i]: merged[i] for i in range(len(values))}


class TryResult(NamedTuple):
    """What one try found.

    Attributes:
        best_C: the chosen C.
        by_C: validation metrics of every C.
        metrics: on the test set, from 0 to 1 (where the metric is a fraction).
        preds, target: of all test samples.
        class_names: of the train set, where it has them.
    """

    best_C: float
    by_C: dict[float, dict[str, float]]
    metrics: dict[str, float]
    preds: Tensor
    target: Tensor
    class_names: Sequence[str] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see the module's docstring. Returns 0."""
    return run_main(argv, benchmark_launcher, LogregEvalConfig)


check_arguments = partial(check_eval_arguments, LogregEvalConfig)


def benchmark_launcher(eval_args: Mapping[str, Any]) -> dict[str, float]:
    """Evaluate as the parsed arguments say, write the results, and return them."""
    config, output_dir = args_dict_to_dataclass(eval_args, LogregEvalConfig)
    model, context = load_model_and_context(
        config.model,
        output_dir,
        allow_unknown_keys=bool(eval_args.get("allow_unknown_keys")),
        datasets=(config.train.dataset, config.train.val_dataset, config.eval.test_dataset),
    )
    results = eval_log_regression_with_model(model=model, autocast_dtype=context["autocast_dtype"], config=config)
    write_results(results, output_dir, RESULTS_FILENAME)
    return results


def eval_log_regression_with_model(
    *, model: nn.Module, autocast_dtype: torch.dtype, config: LogregEvalConfig
) -> dict[str, float]:
    """Classify a test set by logistic regression on frozen features.

    Args:
        model: gives features `[B, D]`; moved to the CPU when all features are there.
        autocast_dtype: what the model runs in.
        config: what to evaluate.

    Returns:
        The metrics of the test set by name, times 100; with several few-shot tries `<name>_mean` and `<name>_std`.

    Raises:
        ValueError: a metric that isn't a number that grows with quality, or data sets that don't fit.
    """
    tries = evaluate_tries(model=model, autocast_dtype=autocast_dtype, config=config)
    percent = {t: _percent(result.metrics) for t, result in tries.items()}
    results = percent[0] if len(percent) == 1 else average_metrics(percent)
    for name, value in results.items():
        logger.info("%s: %.2f", name, value)
    _draw(results, tries, config.output_dir)
    if config.save_results and distributed.is_main_process():
        for t, result in tries.items():
            suffix = None if len(tries) == 1 else str(t)
            save_results(result.preds, result.target, config.output_dir, filename_suffix=suffix)
    return results


def _draw(results: Mapping[str, float], tries: Mapping[int, TryResult], output_dir: str) -> None:
    """Tables and plots: validation accuracy per C; what the first try's model confuses."""
    figures = ResultFigures(output_dir, Path(RESULTS_FILENAME).stem)
    first = next(iter(tries.values()))
    figures.add_table("Logistic regression, test set", [{"chosen C": first.best_C, **results}])
    lines: dict[str, dict[float, float]] = {}
    for t, result in tries.items():
        for C, metrics in result.by_C.items():
            for name, value in metrics.items():
                label = f"validation {name}" + (f", try {t}" if len(tries) > 1 else "")
                lines.setdefault(label, {})[C] = 100.0 * value
    figures.add_accuracies(
        "accuracy_per_C.png", "Logistic regression", lines, x_label="C (inverse penalty)", chosen=first.best_C
    )
    pairs = ClassPairs(first.preds.shape[1])
    pairs.update(first.preds, first.target)  # of all processes already
    title = f"Logistic regression, C = {first.best_C:.3g}"
    figures.add_confusion("confusion.png", title, pairs.own(), pairs.num_classes, first.class_names)
    figures.add_table("Validation", [{"C": C, **_percent(metrics)} for C, metrics in first.by_C.items()])
    figures.write()


def _percent(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: 100.0 * value for name, value in metrics.items()}


def evaluate_tries(*, model: nn.Module, autocast_dtype: torch.dtype, config: LogregEvalConfig) -> dict[int, TryResult]:
    """The result of every try; the arguments are those of `eval_log_regression_with_model`."""
    test_metric_type = config.eval.test_metric_type or config.train.val_metric_type
    for metric_type in (config.train.val_metric_type, test_metric_type):
        if metric_type in _NOT_A_QUALITY:
            raise ValueError(f"logistic regression can't be chosen or summarised by {metric_type.name}")
    device = default_device()
    model = model.to(device).eval()
    transform = _make_transform(config.transform)
    train_dataset = _make_dataset(config.train.dataset, transform)
    test_dataset = _make_dataset(config.eval.test_dataset, transform)
    report_skipped(train_dataset, config.output_dir, "train")
    report_skipped(test_dataset, config.output_dir, "test")
    num_classes = get_num_classes(train_dataset)
    class_names = get_class_names(train_dataset, num_classes)
    few_shot = config.few_shot
    if config.train.val_dataset is None:
        part = _VALIDATION_PART_FEW_SHOT if few_shot.enable else _VALIDATION_PART
        train_dataset, val_dataset = split_train_val_datasets(train_dataset, part)
    else:
        val_dataset = _make_dataset(config.train.val_dataset, transform)
        report_skipped(val_dataset, config.output_dir, "val")
    subsets = create_train_dataset_dict(train_dataset, few_shot.enable, few_shot.k_or_percent, few_shot.n_tries)

    batch_size, num_workers = config.train.batch_size, config.train.num_workers
    with autocast_context(device, autocast_dtype):
        train_sets = extract_subsets(model, train_dataset, subsets, batch_size, num_workers)
        val_set = _extract(model, val_dataset, batch_size, num_workers, config.train.val_metric_type)
        eval_batch_size = config.eval.batch_size or batch_size
        test_set = _extract(model, test_dataset, eval_batch_size, config.eval.num_workers, test_metric_type)
    model.cpu()  # makes room for the solver
    return {
        t: _evaluate_one(train_set, val_set, test_set, test_dataset, num_classes, test_metric_type, config)._replace(
            class_names=class_names
        )
        for t, train_set in train_sets.items()
    }


_NOT_A_QUALITY = (ClassificationMetricType.PER_CLASS_ACCURACY, ClassificationMetricType.IMAGENET_C_METRIC)


def _make_transform(config: TransformConfig) -> Any:
    if config.resize_size != config.crop_size:
        logger.warning(
            "resize %d and crop %d differ: parts of the images are cut off", config.resize_size, config.crop_size
        )
    return make_classification_eval_transform(resize_size=config.resize_size, crop_size=config.crop_size)


def _make_dataset(dataset_str: str, transform: Any) -> Any:
    return make_dataset(
        dataset_str=dataset_str, transform=transform, target_transform=get_target_transform(dataset_str)
    )


def _extract(
    model: nn.Module, dataset: Any, batch_size: int, num_workers: int, metric_type: ClassificationMetricType
) -> tuple[Tensor, Tensor]:
    lists = metric_type is ClassificationMetricType.ANY_MATCH_ACCURACY
    return extract_features(model, dataset, batch_size, num_workers, gather_on_cpu=True, lists_of_labels=lists)


def _evaluate_one(
    train_set: tuple[Tensor, Tensor],
    val_set: tuple[Tensor, Tensor],
    test_set: tuple[Tensor, Tensor],
    test_dataset: Any,
    num_classes: int,
    test_metric_type: ClassificationMetricType,
    config: LogregEvalConfig,
) -> TryResult:
    """Choose C on the validation set, train again, test."""
    train = config.train
    features, labels = (tensor.to(train.train_features_device) for tensor in train_set)
    dtype = as_torch_dtype(train.train_dtype)
    by_C = sweep_C_values(
        train_features=features,
        train_labels=labels,
        val_features=val_set[0],
        val_labels=val_set[1],
        val_metric_type=train.val_metric_type,
        num_classes=num_classes,
        train_dtype=dtype,
        tol=train.tol,
        max_train_iters=train.max_train_iters,
        solver=train.solver,
    )
    best_C = max(by_C, key=lambda C: by_C[C]["top-1"])  # the first of equals
    logger.info("chosen: C=%.6g with %s", best_C, by_C[best_C])
    if not config.few_shot.enable:  # validation samples would change the number of shots: they stay unused
        features = torch.cat([features, val_set[0].to(features.device)])
        labels = torch.cat([labels, val_set[1].to(labels.device)])
    module = train_for_C(
        C=best_C,
        max_iter=train.max_train_iters,
        train_features=features,
        train_labels=labels,
        dtype=dtype,
        tol=train.tol,
        num_classes=num_classes,
        solver=train.solver,
    )
    return TryResult(best_C, by_C, *_test(module, *test_set, test_dataset, num_classes, test_metric_type))


def _test(
    module: LogRegModule,
    features: Tensor,
    labels: Tensor,
    dataset: Any,
    num_classes: int,
    metric_type: ClassificationMetricType,
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Metrics, predictions and targets; every process takes its share of the samples."""
    share = torch.arange(distributed.get_rank(), len(features), distributed.get_world_size())
    preds = module(features[share]).cpu()
    metric = build_classification_metric(metric_type, num_classes=num_classes, dataset=dataset)
    metric.update(preds, labels[share])
    accumulator = ResultsAccumulator()
    accumulator.update(preds=preds, target=labels[share], index=share)
    samples = accumulator.accumulate()
    metrics = {name: value.item() for name, value in metric.compute().items()}
    return metrics, samples["preds"], samples["target"]


if __name__ == "__main__":
    sys.exit(main())
