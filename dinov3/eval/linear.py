"""Linear classification on frozen features: a script, and what it is made of.

Linear heads for a sweep of learning rates and layers are trained at the same time, with augmented images; the one that
is best on the validation set is tested:

    python dinov3/eval/linear.py output_dir=<OUT> train.dataset=<STRING> train.val_dataset=<STRING>
        model.config_file=<OUT>/config.yaml model.pretrained_weights=<OUT>/teacher_checkpoint.pth

The heads are in `linear_heads.py`, the loop that trains them in `probe.py`.
"""

import json
import logging
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from dinov3 import distributed
from dinov3.checkpointer import CheckpointRetentionPolicy
from dinov3.data import (
    make_classification_eval_transform,
    make_classification_train_transform,
    make_dataset,
)
from dinov3.data.transforms import get_target_transform
from dinov3.eval.config import MISSING, FewShotConfig, LossType, ModelConfig, TransformConfig
from dinov3.eval.data import (
    create_train_dataset_dict,
    get_class_names,
    get_num_classes,
    make_endless_loader,
    report_skipped,
)
from dinov3.eval.evaluate import evaluate, make_eval_data_loader
from dinov3.eval.features import ModelWithIntermediateLayers, module_device
from dinov3.eval.helpers import args_dict_to_dataclass, check_eval_arguments, run_main, write_results
from dinov3.eval.linear_heads import (
    AllClassifiers,
    LinearClassifier,
    create_linear_input,
    scale_lr,
    setup_linear_classifiers,
)
from dinov3.eval.metrics import ClassificationMetricType, build_classification_metric
from dinov3.eval.metrics.confusion import ClassPairs
from dinov3.eval.probe import ProbeCheckpoints, average_gradients, broadcast_parameters, train_probe
from dinov3.eval.result_figures import ResultFigures
from dinov3.eval.setup import autocast_context, load_model_and_context
from dinov3.eval.sweep_sgd import SweepSGD
from dinov3.eval.utils import average_metrics, save_results
from dinov3.optim.lr_schedulers import fast_forward
from dinov3.utils.device import default_device

__all__ = [
    "MAIN_METRICS",
    "RESULTS_FILENAME",
    "AllClassifiers",
    "EvalConfig",
    "Evaluator",
    "FewShotConfig",
    "LinearClassifier",
    "LinearEvalConfig",
    "LinearPostprocessor",
    "OptimizerType",
    "SchedulerType",
    "TrainConfig",
    "TransformConfig",
    "benchmark_launcher",
    "create_linear_input",
    "eval_linear_with_model",
    "main",
    "scale_lr",
    "setup_linear_classifiers",
    "train_linear_classifiers",
]

logger = logging.getLogger("dinov3")

RESULTS_FILENAME = "results-linear.csv"
MAIN_METRICS = [".*_accuracy(_mean)?"]
_JSON_FILENAME = "results_eval_linear.json"
_NOT_AN_ACCURACY = (ClassificationMetricType.PER_CLASS_ACCURACY, ClassificationMetricType.IMAGENET_C_METRIC)


class OptimizerType(Enum):
    """Optimizers of the heads, without weight decay."""

    SGD = "sgd"
    ADAMW = "adamw"

    def get_optimizer(self, optim_param_groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over groups with their own `lr`."""
        if self is OptimizerType.SGD:
            return SweepSGD(optim_param_groups, momentum=0.9)
        return torch.optim.AdamW(optim_param_groups, weight_decay=0)


class SchedulerType(Enum):
    """Learning-rate schedules of the heads, stepped after every iteration."""

    COSINE_ANNEALING = "cosine_annealing"
    ONE_CYCLE = "one_cycle"

    def get_scheduler(self, optimizer: torch.optim.Optimizer, *, epoch_length: int, epochs: int) -> LRScheduler:
        """The schedule over all iterations, up to (one-cycle) or down from (cosine) each group's learning rate."""
        if self is SchedulerType.COSINE_ANNEALING:
            return CosineAnnealingLR(optimizer, T_max=epochs * epoch_length, eta_min=0)
        rates = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, max_lr=rates, steps_per_epoch=epoch_length, epochs=epochs)


@dataclass
class TrainConfig:
    """How the heads are trained, and what chooses among them."""

    dataset: str = MISSING
    """Dataset string."""
    val_dataset: str = MISSING
    """Dataset string."""
    val_metric_type: ClassificationMetricType = ClassificationMetricType.MEAN_ACCURACY
    """Its `top-1` chooses the head."""
    batch_size: int = 128
    """Per process."""
    num_workers: int = 8
    """Of the data loader, per process."""
    learning_rates: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
    """For a batch of 256; scaled in proportion to the batch of all processes."""
    n_last_blocks_list: tuple[int, ...] = (1,)
    """Numbers of last layers whose class tokens a head sees."""
    loss_type: LossType = LossType.CROSS_ENTROPY
    optimizer_type: OptimizerType = OptimizerType.SGD
    scheduler_type: SchedulerType = SchedulerType.COSINE_ANNEALING
    epochs: int = 10
    epoch_length: int = 1250
    """Iterations."""
    save_checkpoint_iterations: int | None = None
    """Iterations between checkpoints; null: one epoch."""
    eval_period_iterations: int | None = None
    """Iterations between evaluations; null: one epoch."""
    checkpoint_retention_policy: CheckpointRetentionPolicy = CheckpointRetentionPolicy.NONE
    """What remains in the end."""
    resume: bool = True
    """Go on from the newest checkpoint."""
    classifier_fpath: str | None = None
    """Folder of checkpoints to start from; null: that of the output directory."""


@dataclass
class EvalConfig:
    """What the best head is tested on."""

    test_datasets: tuple[str, ...] = ()
    """Dataset strings."""
    test_metric_types: tuple[ClassificationMetricType, ...] = ()
    """One per test set; empty: that of the validation set for all."""
    batch_size: int = 256
    """Per process, also of the validation set."""
    num_workers: int = 8
    """Of the data loader, per process."""


@dataclass
class LinearEvalConfig:
    """Configuration of the linear evaluation."""

    model: ModelConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    transform: TransformConfig = field(default_factory=TransformConfig)
    few_shot: FewShotConfig = field(default_factory=FewShotConfig)
    save_results: bool = False
    """Write predictions and targets of the best head."""
    output_dir: str = ""


class LinearPostprocessor:
    """Logits of one head, restricted to the classes that a data set has.

    Args:
        name: of the head.
        class_mapping: columns of the logits that are classes of the data set, in its order; None: all.
    """

    def __init__(self, name: str, class_mapping: Sequence[int] | None = None) -> None:
        self.name = name
        self.class_mapping = None if class_mapping is None else torch.as_tensor(class_mapping, dtype=torch.int64)

    def __call__(self, outputs: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        preds = outputs[self.name]
        if self.class_mapping is not None:
            preds = preds[:, self.class_mapping.to(preds.device)]
        return {"preds": preds, "target": targets}


class HeadAccuracy(NamedTuple):
    """A head and its accuracy on a data set, from 0 to 1."""

    name: str
    accuracy: float


@dataclass
class Evaluator:
    """Measures heads on one data set.

    Attributes:
        batch_size, num_workers: of the data loader.
        transform_config: of the images.
        dataset_str: the data set. Its `get_imagenet_class_mapping()`, if it has one, says which outputs are its
            classes.
        metric_type: of its metric, `top-1` counts.
        training_num_classes: outputs of the heads.
        output_dir: where `results_eval_linear.json` is appended to, and predictions are written.
        save_results: write the predictions of the best head.
        accuracies: of all heads measured last, from 0 to 1.
        pairs: what the best head took for what in the final evaluation (`ClassPairs`).
    """

    batch_size: int
    num_workers: int
    transform_config: TransformConfig
    dataset_str: str
    metric_type: ClassificationMetricType
    training_num_classes: int
    output_dir: str
    save_results: bool = False
    accuracies: dict[str, float] = field(default_factory=dict, init=False)
    pairs: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.metric_type in _NOT_AN_ACCURACY:
            raise ValueError(
                f"{self.metric_type.name} is a vector or an error, not an accuracy: it can't choose among heads or be "
                f"reported for {self.dataset_str}"
            )
        transform = make_classification_eval_transform(
            resize_size=self.transform_config.resize_size, crop_size=self.transform_config.crop_size
        )
        target_transform = get_target_transform(self.dataset_str)
        self.dataset = make_dataset(
            dataset_str=self.dataset_str, transform=transform, target_transform=target_transform
        )
        self.class_mapping: list[int] | None = None
        if hasattr(self.dataset, "get_imagenet_class_mapping"):
            self.class_mapping = list(self.dataset.get_imagenet_class_mapping())

    def evaluate(
        self,
        *,
        feature_model: nn.Module,
        linear_classifiers: AllClassifiers,
        iteration: int,
        head: str | None = None,
        suffix: str | None = None,
        keep_pairs: bool = False,
    ) -> HeadAccuracy:
        """The best head and its accuracy; a collective of the world.

        Args:
            feature_model: gives what the heads take.
            linear_classifiers: the heads.
            iteration: written into the log.
            head: measure this one; default: all, and take the first of the best.
            suffix: of the files of predictions.
            keep_pairs: set `pairs`.
        """
        names = list(linear_classifiers.classifiers_dict) if head is None else [head]
        num_classes = self.training_num_classes if self.class_mapping is None else len(self.class_mapping)

        def pairs_of(name: str) -> list[tuple[str, str]]:
            return [(name, "pairs")] if keep_pairs else []

        _, metrics, samples = evaluate(
            nn.Sequential(feature_model, linear_classifiers),
            make_eval_data_loader(
                dataset=self.dataset,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                metric_type=self.metric_type,
            ),
            {key: LinearPostprocessor(name, self.class_mapping) for name in names for key in (name, *pairs_of(name))},
            {
                name: build_classification_metric(self.metric_type, num_classes=num_classes, dataset=self.dataset)
                for name in names
            }
            | {key: ClassPairs(num_classes) for name in names for key in pairs_of(name)},
            module_device(linear_classifiers),
            accumulate_results=self.save_results,
        )
        linear_classifiers.train()
        self.accuracies = {name: metrics[name]["top-1"].item() for name in names}
        best = HeadAccuracy(*max(self.accuracies.items(), key=lambda item: item[1]))  # the first of equals
        self.pairs = metrics[best.name, "pairs"]["pairs"] if keep_pairs else None
        logger.info("iteration %d, %s: best is %s with %.4f", iteration, self.dataset_str, best.name, best.accuracy)
        if distributed.is_main_process():
            self._write(best, iteration, samples[best.name], suffix)
        return best

    def _write(self, best: HeadAccuracy, iteration: int, samples: Any, suffix: str | None) -> None:
        folder = Path(self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / _JSON_FILENAME, "a", encoding="utf-8") as file:
            file.write(f"iter: {iteration}\n{json.dumps({'best_classifier': best._asdict()})}\n\n")
        if samples is not None:
            name = _file_name(self.dataset_str) + ("" if suffix is None else f"_{suffix}")
            save_results(samples["preds"], samples["target"], folder, filename_suffix=name)


def _file_name(dataset_str: str) -> str:
    """The dataset string, or a name made from it where it can't be one."""
    if re.fullmatch(r"[\w.=+-]+", dataset_str, re.ASCII):
        return dataset_str
    readable = re.sub(r"[^\w.=+-]+", "_", dataset_str, flags=re.ASCII)[-100:]
    return f"{readable}_{zlib.crc32(dataset_str.encode()):08x}"  # different strings never share a file


def train_linear_classifiers(
    *,
    feature_model: nn.Module,
    train_dataset: Any,
    train_config: TrainConfig,
    training_num_classes: int,
    val_evaluator: Evaluator,
    checkpoint_output_dir: str | Path,
    heads: tuple[AllClassifiers, list[dict[str, Any]]] | None = None,
    seed: int = 0,
    suffix: str | None = None,
) -> tuple[AllClassifiers, HeadAccuracy]:
    """Train all heads, and find the best one on the validation set. A collective of the world.

    Interrupted, it goes on from the newest checkpoint to the same weights: the order of the samples and their
    augmentations are functions of (seed, iteration).

    Args:
        feature_model: from images to (patch tokens, class token) per layer, without gradient.
        train_dataset: of (image, label).
        train_config: how to train.
        training_num_classes: outputs of the heads.
        val_evaluator: measures the heads.
        checkpoint_output_dir: where checkpoints are.
        heads: the heads and their parameter groups; default: those of the configuration.
        seed: of the order of the samples.
        suffix: of the files of predictions of the final evaluation.

    Returns:
        The trained heads, and the best of them.
    """
    device = default_device()
    linear_classifiers, groups = heads or _make_heads(feature_model, train_dataset, train_config, training_num_classes)
    parameters = [parameter for group in groups for parameter in group["params"]]
    broadcast_parameters(parameters)
    optimizer = train_config.optimizer_type.get_optimizer(groups)
    scheduler = train_config.scheduler_type.get_scheduler(
        optimizer, epoch_length=train_config.epoch_length, epochs=train_config.epochs
    )
    checkpoints = ProbeCheckpoints(
        checkpoint_output_dir,
        {"linear_classifiers": _Prefixed(linear_classifiers), "optimizer": optimizer, "scheduler": scheduler},
        train_config.checkpoint_retention_policy,
        fast_forward=partial(fast_forward, scheduler),
        optional=("scheduler",),
    )
    done = checkpoints.resume(train_config.classifier_fpath) if train_config.resume else 0
    best: list[HeadAccuracy] = []

    def step(batch: Any) -> dict[str, Tensor]:
        images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        loss = linear_classifiers.loss_and_gradients(feature_model(images), labels, train_config.loss_type)
        average_gradients(parameters)
        optimizer.step()
        scheduler.step()
        return {"loss": loss}

    def evaluate_heads(iteration: int) -> float:
        final = iteration == max_iter
        found = val_evaluator.evaluate(
            feature_model=feature_model,
            linear_classifiers=linear_classifiers,
            iteration=iteration,
            suffix=suffix if final else None,
            keep_pairs=final,
        )
        best[:] = [found]
        return 100.0 * found.accuracy

    max_iter = train_config.epochs * train_config.epoch_length
    train_probe(
        step=step,
        batches=make_endless_loader(
            train_dataset,
            batch_size=train_config.batch_size,
            num_workers=train_config.num_workers,
            seed=seed,
            done=done,
        ),
        done=done,
        max_iter=max_iter,
        checkpoints=checkpoints,
        save_period=train_config.save_checkpoint_iterations or train_config.epoch_length,
        evaluate=evaluate_heads,
        eval_period=train_config.eval_period_iterations or train_config.epoch_length,
    )
    return linear_classifiers, best[0]


def _make_heads(
    feature_model: nn.Module, train_dataset: Any, train_config: TrainConfig, num_classes: int
) -> tuple[AllClassifiers, list[dict[str, Any]]]:
    with torch.no_grad():
        sample = feature_model(train_dataset[0][0].unsqueeze(0).to(default_device()))
    return setup_linear_classifiers(
        sample,
        train_config.n_last_blocks_list,
        train_config.learning_rates,
        train_config.batch_size,
        num_classes,
    )


class _Prefixed:
    """A module whose state is stored under `module.`, as files of the published code have it (with or without one)."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def state_dict(self) -> dict[str, Tensor]:
        return {f"module.{key}": value for key, value in self.module.state_dict().items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        self.module.load_state_dict({key.removeprefix("module."): value for key, value in state_dict.items()})


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see the module's docstring. Returns 0."""
    return run_main(argv, benchmark_launcher, LinearEvalConfig)


check_arguments = partial(check_eval_arguments, LinearEvalConfig)


def benchmark_launcher(eval_args: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate as the parsed arguments say, write the results, and return them."""
    config, output_dir = args_dict_to_dataclass(eval_args, LinearEvalConfig)
    model, context = load_model_and_context(
        config.model,
        output_dir,
        allow_unknown_keys=bool(eval_args.get("allow_unknown_keys")),
        datasets=(config.train.dataset, config.train.val_dataset, *config.eval.test_datasets),
    )
    results = eval_linear_with_model(model=model, autocast_dtype=context["autocast_dtype"], config=config)
    write_results(results, output_dir, RESULTS_FILENAME)
    return results


def eval_linear_with_model(
    *, model: nn.Module, autocast_dtype: torch.dtype, config: LinearEvalConfig
) -> dict[str, Any]:
    """Train linear heads on frozen features, and test the one that is best on the validation set.

    Args:
        model: backbone with `get_intermediate_layers`.
        autocast_dtype: what it runs in.
        config: what to evaluate.

    Returns:
        `"<dataset string>_accuracy"` in percent for every test set and the validation set, and `best_classifier`; with
        several few-shot tries `_mean` and `_std` of the accuracies.

    Raises:
        ValueError: test metrics don't match the test sets, or aren't accuracies.
    """
    device = default_device()
    train = config.train
    feature_model = ModelWithIntermediateLayers(
        model.to(device).eval(), max(train.n_last_blocks_list), partial(autocast_context, device, autocast_dtype)
    )
    train_dataset = make_dataset(
        dataset_str=train.dataset,
        transform=make_classification_train_transform(crop_size=config.transform.crop_size),
        target_transform=get_target_transform(train.dataset),
    )
    report_skipped(train_dataset, config.output_dir, "train")
    num_classes = get_num_classes(train_dataset)
    val_evaluator, *test_evaluators = _make_evaluators(config, num_classes)
    few_shot = config.few_shot
    tries = create_train_dataset_dict(train_dataset, few_shot.enable, few_shot.k_or_percent, few_shot.n_tries)
    results: dict[int, dict[str, Any]] = {}
    for t, subset in tries.items():
        several = len(tries) > 1
        suffix = str(t) if several else None
        linear_classifiers, best = train_linear_classifiers(
            feature_model=feature_model,
            train_dataset=subset,
            train_config=train,
            training_num_classes=num_classes,
            val_evaluator=val_evaluator,
            checkpoint_output_dir=Path(config.output_dir) / (f"checkpoints_{t}" if several else "checkpoints"),
            seed=t,
            suffix=suffix,
        )
        tested = [
            evaluator.evaluate(
                feature_model=feature_model,
                linear_classifiers=linear_classifiers,
                iteration=train.epochs * train.epoch_length,
                head=best.name,
                suffix=suffix,
                keep_pairs=True,
            )
            for evaluator in test_evaluators
        ]
        results[t] = _summarize([val_evaluator, *test_evaluators], [best, *tested])
        if t == next(iter(tries)):
            _draw(linear_classifiers, best, [val_evaluator, *test_evaluators], train_dataset, config.output_dir)
    final = results[0] if len(results) == 1 else average_metrics(results, ignore_keys=["best_classifier"])
    logger.info("results: %s", final)
    return final


def _make_evaluators(config: LinearEvalConfig, num_classes: int) -> list[Evaluator]:
    """Of the validation set, then of the test sets."""
    metric_types = config.eval.test_metric_types or (config.train.val_metric_type,) * len(config.eval.test_datasets)
    if len(metric_types) != len(config.eval.test_datasets):
        raise ValueError(
            f"eval.test_metric_types has {len(metric_types)} entries for {len(config.eval.test_datasets)} "
            "eval.test_datasets: give one for each, or none"
        )
    names = [config.train.val_dataset, *config.eval.test_datasets]
    evaluators = [
        Evaluator(
            batch_size=config.eval.batch_size,
            num_workers=config.eval.num_workers,
            transform_config=config.transform,
            dataset_str=name,
            metric_type=metric_type,
            training_num_classes=num_classes,
            output_dir=config.output_dir,
            save_results=config.save_results,
        )
        for name, metric_type in zip(names, (config.train.val_metric_type, *metric_types), strict=True)
    ]
    for evaluator, role in zip(evaluators, ["val", *["test"] * len(config.eval.test_datasets)], strict=True):
        report_skipped(evaluator.dataset, config.output_dir, role)
    return evaluators


def _short(dataset_str: str) -> str:
    """A dataset string without its folders."""
    return re.sub(r':(root|extra|file)=("[^"]*"|[^:]*)', "", dataset_str)


def _draw(
    heads: AllClassifiers, best: HeadAccuracy, evaluators: Sequence[Evaluator], train_dataset: Any, output_dir: str
) -> None:
    """Tables and plots of one try: validation accuracy of every head; what the best one confuses, set by set."""
    figures = ResultFigures(output_dir, Path(RESULTS_FILENAME).stem)
    validation = evaluators[0].accuracies
    lines: dict[str, dict[float, float]] = {}
    rows = []
    for name, head in heads.classifiers_dict.items():
        percent = 100.0 * validation[name]
        rows.append({"classifier": name, "layers": head.use_n_blocks, "validation, %": percent})
        if head.learning_rate is not None:
            rows[-1]["learning rate"] = f"{head.learning_rate:.6g}"
            label = f"last {head.use_n_blocks} layers" if head.use_n_blocks != 1 else "last layer"
            lines.setdefault(label, {})[float(head.learning_rate)] = percent  # type: ignore[arg-type]
    figures.add_table(
        f"Linear: {best.name}",
        [
            {"data set": evaluator.dataset_str, "metric": str(evaluator.metric_type), "%": 100.0 * value}
            for evaluator in evaluators
            for value in [evaluator.accuracies[best.name]]
        ],
    )
    if lines:
        figures.add_accuracies(
            "accuracy_per_learning_rate.png",
            "Linear heads, validation set",
            lines,
            x_label="learning rate",
            chosen=heads.classifiers_dict[best.name].learning_rate,  # type: ignore[arg-type]
        )
    for i, evaluator in enumerate(evaluators):
        mapping = evaluator.class_mapping
        names = get_class_names(train_dataset, evaluator.training_num_classes)
        num_classes = evaluator.training_num_classes if mapping is None else len(mapping)
        if mapping is not None and names:
            names = [names[number] for number in mapping]
        if evaluator.pairs is not None:
            file = "confusion_validation.png" if i == 0 else f"confusion_test_{i}.png"
            figures.add_confusion(file, f"Linear, {_short(evaluator.dataset_str)}", evaluator.pairs, num_classes, names)
    figures.add_table("All heads", rows)
    figures.write()


def _summarize(evaluators: Sequence[Evaluator], accuracies: Sequence[HeadAccuracy]) -> dict[str, Any]:
    """Percentages by data set, from the last test set to the validation set, the name of the head after the first."""
    summary: dict[str, Any] = {}
    for evaluator, found in zip(reversed(evaluators), reversed(accuracies), strict=True):
        key = f"{evaluator.dataset_str}_accuracy"
        if key in summary:  # the same data set again, with another metric
            key = f"{evaluator.dataset_str}_{evaluator.metric_type}_accuracy"
        summary[key] = 100.0 * found.accuracy
        summary.setdefault("best_classifier", found.name)
    return summary


if __name__ == "__main__":
    sys.exit(main())
