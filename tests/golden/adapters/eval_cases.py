"""Golden cases of `data_evals` that are about `dinov3.eval`.

`eval_case(name, spec, stored)` gives the case. Inputs are built from the phrases of the manifest (`how`), which hold
calls of its `input_rules`.
"""

import ast
import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import Dataset

from tests.golden import fill
from tests.golden.cases import Case, Expected
from tests.golden.inputs import ToyDataset, ToyModel, clustered, labels, multi_hot

Spec = Mapping[str, Any]
_AREA = "data_evals"
# Configuration keys that this package has beyond those of the reference.
_ADDED_KEYS = ("train.similarity_dtype", "train.solver")

# What may hold more than the reference has: checkpoints also keep the scheduler, and of heads whose learning rates
# agree to five decimals all are trained, where the reference keeps one (further ones have a number in their names).
_MORE_ALLOWED = {
    ("linear_train_", "checkpoint_keys"),
    ("linear_train_", "optimizer_options"),
    ("linear_heads", "heads"),
}


def eval_case(name: str, spec: Spec, stored: Mapping[str, Tensor]) -> Case:
    """The case of that name."""
    keys = frozenset(f"{name}/{key}" for key in spec["tensors"])
    prefix = next((prefix for prefix in _RUNNERS if name.startswith(prefix)), None)
    if prefix is None:
        raise ValueError(f"no adapter for the golden case {name!r} ({spec['target']})")
    tolerance = {} if spec["tolerance"] == "exact" else spec["tolerance"]
    expected = {key: Expected(stored[f"{name}/{key}"], **tolerance) for key in spec["tensors"]}
    for key, value in spec["values"].items():
        if not key.startswith("structure"):  # a description for readers, by the manifest's own words
            expected[key] = Expected(value, **tolerance, subset=(prefix, key) in _MORE_ALLOWED)
    return Case(_AREA, name, partial(_RUNNERS[prefix], spec), expected, stored_keys=keys)


def _called(text: str, function: Callable[..., Any], name: str) -> Any:
    """Apply `function` to the arguments of the first call of `name` in a phrase; `rate 0.8` reads as `0.8`."""
    arguments = re.search(rf"{name}\((.*?)\)", text).group(1)
    return function(*ast.literal_eval(f"({arguments.replace('rate ', '')},)"))


def _filled(text: str) -> Tensor:
    """The tensor of the first `fill.tensor(...)` in a phrase."""
    return fill.tensor(*ast.literal_eval(f"({re.search(r'fill.tensor[(](.*?[)].*?)[)]', text).group(1)})"))


# -- Labels and parts of data sets ------------------------------------------------------------------------------------


class _Labelled(Dataset[Any]):
    """A data set of labels alone."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def get_targets(self) -> Tensor:
        return self.targets


def _dataset(how: Spec) -> Any:
    if "labels" in how:
        return _Labelled(_called(how["labels"], multi_hot, "multi_hot"))
    return _toy_dataset(how["dataset"])


def _toy_dataset(text: str, **transforms: Any) -> ToyDataset:
    """From a phrase such as "toy dataset 'e2e/train', 40 items, 5 classes, 40x36 pixels"."""
    name, count, classes = re.search(r"toy dataset '(.*?)', (\d+) items, (\d+) classes", text).groups()
    pixels = re.search(r"(\d+)x(\d+) pixels", text)
    sides = map(int, pixels.groups()) if pixels else (8, 8)
    return ToyDataset(name, int(count), int(classes), *sides, **transforms)


def _class_mapping(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.data import create_class_indices_mapping, get_labels, get_num_classes

    dataset = _dataset(spec["how"])
    found = get_labels(dataset)
    mapping = create_class_indices_mapping(found)
    return {"labels": found, "num_classes": get_num_classes(dataset), "mapping": mapping}


def _split(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.data import split_train_val_datasets

    parts = split_train_val_datasets(_dataset(spec["how"]), split_percentage=spec["how"]["split_percentage"])
    return dict(zip(("train", "val"), (part.indices for part in parts), strict=True))


def _few_shot(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.data import create_train_dataset_dict

    how = spec["how"]
    k, n_tries = how["few_shot_k_or_percent"], how["few_shot_n_tries"]
    return {"indices": {t: s.indices for t, s in create_train_dataset_dict(_dataset(how), True, k, n_tries).items()}}


def _pad_multilabel(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.data import pad_multilabel_and_collate

    batch = [(fill.tensor(f"pad/{i}", (2,)), (i, target)) for i, target in enumerate(spec["how"]["targets"])]
    images, (index, targets) = pad_multilabel_and_collate(batch)
    return {"images": images, "index": index, "targets": targets}


# -- Configuration ----------------------------------------------------------------------------------------------------


def _config_class(target: str) -> Any:
    from importlib import import_module

    module = import_module(target)
    names = {"knn": "KnnEvalConfig", "linear": "LinearEvalConfig", "log_regression": "LogregEvalConfig"}
    return getattr(module, names[target.rpartition(".")[2]])


def _plain(config: Any) -> Any:
    """Nested mappings with enums by name, without the keys that only this package has."""

    def convert(value: Any, path: str) -> Any:
        if isinstance(value, Enum):
            return value.name
        if isinstance(value, list | tuple):
            return [convert(item, path) for item in value]
        if isinstance(value, Mapping):
            inner = {key: f"{path}.{key}".lstrip(".") for key in value}
            return {key: convert(value[key], inner[key]) for key in value if inner[key] not in _ADDED_KEYS}
        return value

    return convert(config, "")


def _config_defaults(spec: Spec, _: Path) -> dict[str, Any]:
    from importlib import import_module

    from omegaconf import OmegaConf

    module = import_module(spec["target"])
    defaults = OmegaConf.to_container(OmegaConf.structured(getattr(module, spec["how"]["config"])))
    return {
        "defaults": _plain(defaults),
        "results_filename": module.RESULTS_FILENAME,
        "main_metrics": module.MAIN_METRICS,
    }


def _cli(spec: Spec, _: Path) -> dict[str, Any]:
    from dataclasses import asdict

    from omegaconf.errors import OmegaConfBaseException

    from dinov3.eval.helpers import args_dict_to_dataclass, cli_parser

    config_class = _config_class(spec["target"])
    try:
        arguments = cli_parser(spec["how"]["argv"])
        config, output_dir = args_dict_to_dataclass(arguments, config_class, save_config=False)
    except OmegaConfBaseException as error:
        return {"parsed": {"error": type(error).__name__}}
    return {"parsed": {"config": _plain(asdict(config)), "output_dir": output_dir}}


# -- k-NN -------------------------------------------------------------------------------------------------------------


def _knn(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.knn import KnnModule

    how = spec["how"]
    if "clustered" in how["train"]:
        train, train_labels = _called(how["train"], clustered, "clustered")
        query, offset = _called(how["query"], clustered, "clustered")[0], _filled(how["query"])
        query = query + offset
    else:
        train, train_labels = _filled(how["train"]), _called(how["train"], multi_hot, "multi_hot")
        query = _filled(how["query"])
    options = {key: how[key] for key in ("ks", "T", "skip_first_nn", "num_classes") if key in how}
    knn = KnnModule(train_features=normalize(train, dim=1), train_labels=train_labels, device="cpu", **options)
    query = normalize(query, dim=1)
    similarities, neighbour_labels = knn.compute_neighbors(query)
    scores = knn(query)
    return (
        {"neighbor_similarities": similarities, "neighbor_labels": neighbour_labels}
        | {f"probas_{k}": s for k, s in scores.items()}
        | {f"predicted_{k}": s.argmax(1) for k, s in scores.items()}
    )


_datasets: dict[str, str] = {}  # what the dataset strings of the running case stand for


def _offer_datasets(phrases: Mapping[str, str]) -> None:
    """Let dataset strings name the toy data sets of a case."""
    from dinov3.data.registry import dataset_names, register_dataset

    def build(name: str, transform: Any, target_transform: Any, transforms: Any) -> ToyDataset:
        return _toy_dataset(_datasets[name], transform=transform, target_transform=target_transform)

    for name in set(phrases) - set(dataset_names()):
        register_dataset(name, partial(build, name), keys=())
    _datasets.clear()
    _datasets.update(phrases)


def _toy_model(text: str) -> ToyModel:
    dim, grid = re.search(r"toy model dim=(\d+) grid=(\d+)", text).groups()
    return ToyModel(int(dim), int(grid)).eval()


def _config_of(spec: Spec, config_class: Any, folder: Path) -> Any:
    """The configuration object of an end-to-end case, with the output in `folder`."""
    from dinov3.eval.helpers import args_dict_to_dataclass

    how = spec["how"]
    sizes = how["datasets"]["TEST"].rpartition(", ")[2]
    others = {key: f"{how[key]}, {sizes}" for key in ("OTHER",) if key in how}
    _offer_datasets(how["datasets"] | others)
    config = json.loads(json.dumps(how["config"]).replace("<OUT>", str(folder)))
    return args_dict_to_dataclass(config, config_class, save_config=False)[0]


def _eval_knn(spec: Spec, folder: Path) -> dict[str, Any]:
    from dinov3.eval.knn import KnnEvalConfig, eval_knn_with_model

    config = _config_of(spec, KnnEvalConfig, folder)
    results = eval_knn_with_model(model=_toy_model(spec["how"]["model"]), autocast_dtype=torch.float, config=config)
    lines = (folder / "results_eval_knn.json").read_text().splitlines()
    return {"results": results, "json_lines": [json.loads(line) for line in lines], "files": _files(folder)}


# -- Logistic regression ----------------------------------------------------------------------------------------------


def _logreg_data(how: Spec) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Train and test features and labels."""
    features, classes = _called(how["features"], clustered, "clustered")
    n_train = int(re.search(r"first (\d+) rows train", how["features"]).group(1))
    return (features[:n_train], classes[:n_train]), (features[n_train:], classes[n_train:])


def _logreg_options(how: Spec) -> dict[str, Any]:
    tol, iterations, dtype = re.search(r"tol (\S+), max_train_iters (\d+), (\w+)", how["config"]).groups()
    return {"tol": float(tol), "max_iter": int(iterations), "dtype": getattr(torch, dtype)}


def _logreg_C_grid(_: Spec, __: Path) -> dict[str, Any]:
    from dinov3.eval.log_regression import C_POWER_RANGE

    return {"C": 10**C_POWER_RANGE}


def _logreg_fit(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.log_regression import train_for_C

    (features, classes), (test_features, test_classes) = _logreg_data(spec["how"])
    got: dict[str, Any] = {}
    for C in (key.removeprefix("probas_C") for key in spec["tensors"] if key.startswith("probas_C")):
        options = _logreg_options(spec["how"])
        module = train_for_C(C=float(C), train_features=features, train_labels=classes, **options)
        probabilities = module(test_features)
        got |= {f"probas_C{C}": probabilities, f"coef_C{C}": module.model.weight, f"intercept_C{C}": module.model.bias}
        got[f"accuracy_C{C}"] = (probabilities.argmax(1) == test_classes).double().mean()
    return got


def _logreg_binary(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.log_regression import train_for_C

    (features, classes), (test_features, _) = _logreg_data(spec["how"])
    rows = classes < 2
    C = float(re.search(r"C = ([\d.]+)", spec["how"]["train"]).group(1))
    options = _logreg_options(spec["how"])
    module = train_for_C(C=C, train_features=features[rows], train_labels=classes[rows], **options)
    return {"probas": module(test_features)}


def _logreg_multilabel(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.log_regression import LogRegModule

    (features, _), (test_features, _) = _logreg_data(spec["how"])
    hot = _called(spec["how"]["labels"], multi_hot, "multi_hot")
    C = float(re.search(r"C = ([\d.]+)", spec["how"]["labels"]).group(1))
    return {"probas": LogRegModule(C, **_logreg_options(spec["how"])).fit(features, hot)(test_features)}


def _logreg_sweep(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.log_regression import sweep_C_values
    from dinov3.eval.metrics import ClassificationMetricType

    (features, classes), (val_features, val_classes) = _logreg_data(spec["how"])
    options = _logreg_options(spec["how"])
    by_C = sweep_C_values(
        train_features=features,
        train_labels=classes,
        val_features=val_features,
        val_labels=val_classes,
        val_metric_type=ClassificationMetricType.MEAN_ACCURACY,
        num_classes=int(classes.max()) + 1,
        train_dtype=options["dtype"],
        tol=options["tol"],
        max_train_iters=options["max_iter"],
    )
    best_C = max(by_C, key=lambda C: by_C[C]["top-1"])
    accuracies = [metrics["top-1"] for metrics in by_C.values()]
    return {"accuracy_per_C": accuracies, "best_C": best_C, "best": by_C[best_C]}


def _eval_logreg(spec: Spec, folder: Path) -> dict[str, Any]:
    from dinov3.eval.log_regression import LogregEvalConfig, eval_log_regression_with_model, evaluate_tries

    config = _config_of(spec, LogregEvalConfig, folder)
    arguments = {"model": _toy_model(spec["how"]["model"]), "autocast_dtype": torch.float, "config": config}
    results = eval_log_regression_with_model(**arguments)
    chosen = [result.best_C for result in evaluate_tries(**arguments).values()]
    return {"results": results, "chosen_C": chosen, "files": _files(folder)}


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


# -- Linear heads -----------------------------------------------------------------------------------------------------


def _tokens_list() -> list[tuple[Tensor, Tensor]]:
    """Of the case `linear_input`."""
    return [(fill.tensor(f"linear/patch{i}", (3, 5, 8)), fill.tensor(f"linear/cls{i}", (3, 8))) for i in range(4)]


def _linear_input(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.linear import create_linear_input

    got = {}
    for key in spec["tensors"]:
        n, pooling = re.fullmatch(r"n(\d+)_(avg|cls)", key).groups()
        got[key] = create_linear_input(_tokens_list(), int(n), pooling == "avg")
    return got


def _linear_heads(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.linear import TrainConfig, setup_linear_classifiers

    heads = {}
    for key in spec["values"]["heads"]:
        batch_size, world_size, blocks = re.fullmatch(r"batch(\d+)_world(\d+)_n([\d-]+)", key).groups()
        classifiers, groups = setup_linear_classifiers(
            _tokens_list(),
            [int(n) for n in blocks.split("-")],
            TrainConfig().learning_rates,
            int(batch_size),
            world_size=int(world_size),
        )
        heads[key] = {
            "names": list(classifiers.classifiers_dict),
            "group_lrs": [group["lr"] for group in groups],
            "in_features": [head.linear.in_features for head in classifiers.classifiers_dict.values()],
        }
    return {"heads": heads}


def _linear_forward(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.linear import LinearPostprocessor, setup_linear_classifiers

    how, mapping = spec["how"], spec["values"]["class_mapping"]
    classifiers, _groups = setup_linear_classifiers(
        _tokens_list(), how["n_last_blocks_list"], how["learning_rates"], how["batch_size"], how["num_classes"]
    )
    fill.fill(classifiers)
    outputs = classifiers(_tokens_list())
    name = next(iter(outputs))
    return {
        **outputs,
        "mapped_preds": LinearPostprocessor(name, mapping)(outputs, torch.zeros(3))["preds"],
        "state_dict": {key: list(value.shape) for key, value in classifiers.state_dict().items()},
        "class_mapping": mapping,
    }


def _linear_schedules(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.linear import OptimizerType, SchedulerType

    how = spec["how"]
    got = {}
    for kind in SchedulerType:
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = OptimizerType[how["optimizer"]].get_optimizer([{"params": [weight], "lr": how["lr"]}])
        scheduler = kind.get_scheduler(optimizer, epoch_length=how["epoch_length"], epochs=how["epochs"])
        steps = []
        for _step in range(how["epochs"] * how["epoch_length"]):
            steps.append([optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]])
            optimizer.step()
            scheduler.step()
        got[kind.name] = steps
    return {"lr_and_momentum_per_step": got}


def _linear_train(spec: Spec, folder: Path) -> dict[str, Any]:
    from dinov3.data import make_classification_eval_transform
    from dinov3.eval import linear
    from dinov3.eval.config import TransformConfig
    from dinov3.eval.features import ModelWithIntermediateLayers
    from dinov3.eval.metrics import ClassificationMetricType

    how = spec["how"]
    resize, crop = map(int, re.search(r"\((\d+), (\d+)\)", how["train data"]).groups())
    arguments = {"model": {}, "train": how["train_config"], "eval": {}}
    config = _config_of({"how": how | {"config": arguments}}, linear.LinearEvalConfig, folder)
    transform = make_classification_eval_transform(resize_size=resize, crop_size=crop)
    train_dataset = _toy_dataset(how["datasets"][config.train.dataset], transform=transform)
    num_classes = int(re.search(r"(\d+) classes", how["datasets"][config.train.dataset]).group(1))
    feature_model = ModelWithIntermediateLayers(
        _toy_model(how["model"]), max(config.train.n_last_blocks_list), contextlib.nullcontext
    )
    heads, groups = linear.setup_linear_classifiers(
        feature_model(train_dataset[0][0][None]),
        config.train.n_last_blocks_list,
        config.train.learning_rates,
        config.train.batch_size,
        num_classes,
    )
    with torch.no_grad():
        for head in heads.classifiers_dict.values():
            head.linear.weight.copy_(fill.tensor("head/weight", tuple(head.linear.weight.shape), 0.01))
            head.linear.bias.zero_()
    batch_size, metric = re.search(r"batch_size (\d+).*, (\w+)\)", how["evaluator"]).groups()
    evaluator = linear.Evaluator(
        batch_size=int(batch_size),
        num_workers=0,
        transform_config=TransformConfig(resize_size=resize, crop_size=crop),
        dataset_str=config.train.val_dataset,
        metric_type=ClassificationMetricType[metric],
        training_num_classes=num_classes,
        output_dir=str(folder),
    )
    trained, best = linear.train_linear_classifiers(
        feature_model=feature_model,
        train_dataset=train_dataset,
        train_config=config.train,
        training_num_classes=num_classes,
        val_evaluator=evaluator,
        checkpoint_output_dir=folder / "checkpoints",
        heads=(heads, groups),
    )
    final = torch.load(folder / "checkpoints/final/checkpoint.pth", weights_only=True)
    return {
        **trained.state_dict(),
        "iteration": final["iteration"] + 1,
        "final": {f"{config.train.val_dataset}_accuracy": 100.0 * best.accuracy, "best_classifier": best.name},
        "json": (folder / "results_eval_linear.json").read_text(),
        "checkpoints": sorted(str(path.relative_to(folder)) for path in folder.rglob("*.pth")),
        "checkpoint_keys": sorted(final),
        "checkpoint_head_key_prefix": os.path.commonprefix(list(final["linear_classifiers"])).partition(
            "classifiers_dict"
        )[0],
        "checkpoint_iteration": final["iteration"],
        "param_group_lrs_at_end": [group["lr"] for group in final["optimizer"]["param_groups"]],
        "optimizer_options": final["optimizer"]["param_groups"][0],
    }


def _eval_linear(spec: Spec, folder: Path) -> dict[str, Any]:
    from dinov3.eval.linear import LinearEvalConfig, eval_linear_with_model

    config = _config_of(spec, LinearEvalConfig, folder)
    results = eval_linear_with_model(model=_toy_model(spec["how"]["model"]), autocast_dtype=torch.float, config=config)
    lines = (folder / "results_eval_linear.json").read_text().splitlines()
    heads = [line.partition(":")[0] if line.startswith("{") else line for line in lines]
    return {"result_keys": list(results), "files": _files(folder), "json_line_heads": heads}


# -- Features and results ---------------------------------------------------------------------------------------------


def _wrappers(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.utils import wrap_model

    model, x = _toy_model(spec["how"]["model"]), _filled(spec["how"]["x"])
    with torch.no_grad():
        return {
            "normalize": wrap_model(model)(x),
            "multi_scale": wrap_model(model, normalize=False, multi_scale=True)(x),
            "both": wrap_model(model, normalize=True, multi_scale=True)(x),
        }


def _average_metrics(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.utils import average_metrics

    return {"out": average_metrics(spec["how"]["metrics"], ignore_keys=spec["how"]["ignore_keys"])}


def _results_accumulator(spec: Spec, _: Path) -> Mapping[str, Any]:
    from dinov3.eval.accumulators import ResultsAccumulator

    how = spec["how"]
    preds = _filled(how["preds"])
    size = int(re.search(r"chunks of (\d+)", how["update"]).group(1))
    accumulator = ResultsAccumulator()
    target = labels("accumulate/labels", *preds.shape)
    for index in _filled(how["update"]).argsort().split(size):
        accumulator.update(preds=preds[index], target=target[index], index=index)
    return accumulator.accumulate()


def _save_results(spec: Spec, folder: Path) -> dict[str, Any]:
    import numpy as np

    from dinov3.eval.utils import save_results

    for call in spec["how"]["calls"]:
        suffix = ast.literal_eval(call.removeprefix("filename_suffix "))
        save_results(torch.rand(3, 2), torch.arange(3), str(folder), filename_suffix=suffix)
    return {"files": _files(folder), "dtype": str(np.load(folder / "preds.npy").dtype)}


def _results(spec: Spec, folder: Path) -> dict[str, Any]:
    from dinov3.eval import results

    written = {}
    for extension in ("csv", "jsonl", "yaml"):
        path = folder / f"table.{extension}"
        results.save_from_dict(spec["how"]["data"], str(path))
        written[extension] = path.read_text()
    return written | {"loaded": results.load(str(folder / "table.csv")).columns}


# -- Metrics ----------------------------------------------------------------------------------------------------------


def _metric_types(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.metrics import ClassificationMetricType

    members = {}
    for member in ClassificationMetricType:
        flags = (member.is_topk_accuracy_metric, member.is_topk_recall_metric, member.is_multilabel)
        members[member.name] = [str(member), member.averaging_method, *flags]
    return {"members": members}


def _scores(how: Spec) -> tuple[Tensor, Tensor]:
    """Scores, raised at each row's target, and the targets."""
    preds = _filled(how["preds"])
    target = labels("metric/target", *preds.shape)
    raised = float(re.search(r"plus ([\d.]+) at", how["preds"]).group(1))
    return preds.scatter_add(1, target[:, None], torch.full((len(preds), 1), raised)), target


class _Grouped:
    """The data set of the group-by metrics."""

    def __init__(self, count: int, classes: int) -> None:
        self.count, self.classes = count, classes

    def get_mapped_targets(self) -> Any:
        columns = [labels(f"groupby/{name}", self.count, self.classes) for name in ("a", "b")]
        return torch.stack(columns, dim=1).numpy()

    def get_groupby_labels(self) -> dict[str, Any]:
        return {"place": [f"p{i}" for i in labels("groupby/place", self.count, 3).tolist()]}


def _metric(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.metrics import ClassificationMetricType, build_classification_metric

    how = spec["how"]
    metric_type = ClassificationMetricType[re.search(r"ClassificationMetricType\.(\w+)", spec["target"]).group(1)]
    preds, target = _scores(how)
    count, classes = preds.shape
    dataset = None
    if "GROUPBY" in metric_type.name:
        target, dataset = torch.arange(count), _Grouped(count, classes)
    elif metric_type is ClassificationMetricType.ANY_MATCH_ACCURACY:
        columns = [labels(f"metric/l{i}", count, classes) for i in (0, 1)]
        target = torch.stack([*columns, torch.full((count,), -1)], dim=1)
        target[labels("metric/none", count, 5) == 0] = -1
    elif metric_type.is_multilabel or "MULTILABEL" in metric_type.name:
        target = _called(how["multi-hot target"], multi_hot, "multi_hot")
    metric = build_classification_metric(metric_type, num_classes=how["num_classes"], dataset=dataset)
    _update(metric, preds, target)
    return {"out": metric.compute()}


def _update(metric: Any, preds: Tensor, target: Tensor) -> None:
    for rows in (slice(0, 10), slice(10, 20), slice(20, None)):
        metric.update(preds[rows], target[rows])


def _metric_default_ks(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.metrics import ClassificationMetricType, build_classification_metric

    keys = {}
    for n in spec["how"]["num_classes"]:
        metric = build_classification_metric(ClassificationMetricType.MEAN_ACCURACY, num_classes=n)
        metric.update(torch.eye(n), torch.arange(n))
        keys[f"keys_{n}"] = list(metric.compute())
    return keys


def _metric_accuracy_function(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.metrics import accuracy

    return {"out": [a.item() for a in accuracy(*_scores(spec["how"]["inputs"]), topk=spec["how"]["topk"])]}


def _metric_imagenet_c(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.metrics import imagenet_c

    metric = imagenet_c.ImageNet_C_Metric()
    metric.total = (fill.tensor("imagenet_c/total", (95,)).abs() * 20).floor() + 5
    metric.tp = (metric.total * fill.tensor("imagenet_c/rate", (95,)).sigmoid()).floor()
    names = imagenet_c.ALEXNET_ERRORS
    return {
        "mce": metric.compute()["top-1"],
        "alexnet_errors": names,
        "ids": {f"{name}/{level}": imagenet_c.state_index(name, level) for name in names for level in range(1, 6)},
    }


def _metric_imagenet_c_update(spec: Spec, _: Path) -> dict[str, Any]:
    from dinov3.eval.metrics.imagenet_c import ImageNet_C_Metric

    how = spec["how"]
    preds, target = _scores(how)
    count, types = len(target), how["corruption_types"]
    corruption, level = labels("imagenet_c/type", count, len(types)), labels("imagenet_c/level", count, 5) + 1
    metric = ImageNet_C_Metric(corruption_types=types)
    _update(metric, preds, torch.stack([target, corruption, level], dim=1))
    return {"tp": metric.tp, "total": metric.total}


# By the start of a case's name; the first that fits.
_RUNNERS: dict[str, Callable[[Spec, Path], Mapping[str, Any]]] = {
    "class_mapping": _class_mapping,
    "split_": _split,
    "few_shot_": _few_shot,
    "pad_multilabel": _pad_multilabel,
    "config_defaults_": _config_defaults,
    "cli_": _cli,
    "knn_": _knn,
    "eval_knn_": _eval_knn,
    "linear_input": _linear_input,
    "linear_heads": _linear_heads,
    "linear_forward": _linear_forward,
    "linear_schedules": _linear_schedules,
    "linear_train_": _linear_train,
    "eval_linear_": _eval_linear,
    "logreg_C_grid": _logreg_C_grid,
    "logreg_fit": _logreg_fit,
    "logreg_binary": _logreg_binary,
    "logreg_multilabel": _logreg_multilabel,
    "logreg_sweep": _logreg_sweep,
    "eval_logreg_": _eval_logreg,
    "wrappers": _wrappers,
    "average_metrics": _average_metrics,
    "results_accumulator": _results_accumulator,
    "results_": _results,
    "save_results": _save_results,
    "metric_types": _metric_types,
    "metric_default_ks": _metric_default_ks,
    "metric_accuracy_function": _metric_accuracy_function,
    "metric_imagenet_c_update": _metric_imagenet_c_update,
    "metric_imagenet_c": _metric_imagenet_c,
    "metric_": _metric,
}
