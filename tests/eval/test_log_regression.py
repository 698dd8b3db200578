"""The logistic-regression evaluation: choosing C, few-shot, processes, files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinov3.eval import log_regression
from dinov3.eval.helpers import args_dict_to_dataclass
from dinov3.eval.log_regression import (
    C_POWER_RANGE,
    LogregEvalConfig,
    LogRegModule,
    eval_log_regression_with_model,
    evaluate_tries,
    sweep_C_values,
)
from dinov3.eval.metrics import ClassificationMetricType
from tests.eval.toys import MeanColour, VectorDataset, write_colour_folders
from tests.helpers.distributed import run_distributed

_ACCURACY = ClassificationMetricType.MEAN_ACCURACY


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    write_colour_folders(folder / "train", 12)
    write_colour_folders(folder / "val", 5, seed=1)
    return folder


@pytest.fixture(autouse=True)
def _short_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_regression, "C_POWER_RANGE", torch.linspace(-4, 2, 7))


def _config(folders: Path, out: Path, **changes: Any) -> LogregEvalConfig:
    arguments: dict[str, Any] = {
        "model": {},
        "train": {"dataset": f"ImageFolder:root={folders}/train:index_cache=off", "batch_size": 4, "num_workers": 0},
        "eval": {"test_dataset": f"ImageFolder:root={folders}/val:index_cache=off", "num_workers": 0},
        "transform": {"resize_size": 32, "crop_size": 32},
        "output_dir": str(out),
        "save_results": True,
    }
    for section, values in changes.items():
        arguments[section] = {**arguments.get(section, {}), **values} if isinstance(values, dict) else values
    return args_dict_to_dataclass(arguments, LogregEvalConfig, save_config=False)[0]


def _run(config: LogregEvalConfig) -> dict[str, float]:
    return eval_log_regression_with_model(model=MeanColour(), autocast_dtype=torch.float32, config=config)


@pytest.mark.parametrize("solver", ["lbfgs", "sklearn"])
def test_colours_are_told_apart(folders: Path, tmp_path: Path, solver: str) -> None:
    assert _run(_config(folders, tmp_path, train={"solver": solver})) == {"top-1": 100.0}
    target = np.load(tmp_path / "target.npy")
    assert target.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    preds = np.load(tmp_path / "preds.npy")
    assert preds.dtype == np.float64
    assert (preds.argmax(1) == target).all()


def _sweep() -> dict[float, dict[str, float]]:
    train, val = VectorDataset(60, spread=2.0), VectorDataset(40, seed=1, spread=2.0)
    return sweep_C_values(
        train_features=train.vectors,
        train_labels=train.targets,
        val_features=val.vectors,
        val_labels=val.targets,
        val_metric_type=_ACCURACY,
        num_classes=5,
        tol=1e-4,
        train_dtype=torch.float32,
    )


def test_every_process_learns_the_metrics_of_all_values(tmp_path: Path) -> None:
    values = 10**C_POWER_RANGE
    with pytest.MonkeyPatch.context() as patch:  # other processes know nothing of the short sweep
        patch.setattr(log_regression, "C_POWER_RANGE", C_POWER_RANGE)
        alone = _sweep()
    assert list(alone) == values.tolist()
    for result in run_distributed(_sweep, 3, tmp_path):
        assert list(result) == list(alone)
        accuracies = [[metrics["top-1"] for metrics in r.values()] for r in (result, alone)]
        assert accuracies[0] == pytest.approx(accuracies[1], abs=1 / 39)  # a sample on the border may move


def test_the_result_does_not_depend_on_the_number_of_processes(folders: Path, tmp_path: Path) -> None:
    alone = _run(_config(folders, tmp_path / "one", train={"tol": 1e-6}))
    assert run_distributed(_run, 2, tmp_path, _config(folders, tmp_path / "two", train={"tol": 1e-6})) == [alone] * 2
    assert np.load(tmp_path / "two/target.npy").tolist() == np.load(tmp_path / "one/target.npy").tolist()


def test_validation_samples_train_the_last_model_except_with_few_shots(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on: list[int] = []
    fit = LogRegModule.fit

    def counting_fit(self: LogRegModule, features: Any, labels: Any) -> LogRegModule:
        trained_on.append(len(labels))
        return fit(self, features, labels)

    monkeypatch.setattr(LogRegModule, "fit", counting_fit)
    _run(_config(folders, tmp_path))
    few_shot = _config(folders, tmp_path, few_shot={"enable": True, "k_or_percent": 3, "n_tries": 2})
    results = _run(few_shot)
    assert trained_on == [36, 9, 9]
    assert list(results) == ["top-1_mean", "top-1_std"]
    assert {path.name for path in tmp_path.glob("*_?.npy")} == {
        f"{name}_{t}.npy" for name in ("preds", "target") for t in range(2)
    }
    separate = f"ImageFolder:root={folders}/val:index_cache=off"
    _run(_config(folders, tmp_path, train={"val_dataset": separate}))
    assert trained_on[-1] == 36 + 15


def test_the_backbone_leaves_the_device(folders: Path, tmp_path: Path) -> None:
    model = MeanColour()
    results = evaluate_tries(model=model, autocast_dtype=torch.float32, config=_config(folders, tmp_path))
    assert next(model.parameters()).device.type == "cpu"
    assert results[0].best_C == pytest.approx(1e-4)  # the first of equally good values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"val_metric_type": "PER_CLASS_ACCURACY"}}, "can't be chosen or summarised by PER_CLASS_ACCURACY"),
        ({"eval": {"test_metric_type": "IMAGENET_C_METRIC"}}, "by IMAGENET_C_METRIC"),
        ({"train": {"solver": "adam"}}, "lbfgs or sklearn, got 'adam'"),
        ({"train": {"train_dtype": "float16"}}, "float32 or float64"),
    ],
)
def test_impossible_options_are_named(folders: Path, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _run(_config(folders, tmp_path, **changes))


def test_a_module_without_training_says_so() -> None:
    with pytest.raises(RuntimeError, match="call fit"):
        LogRegModule(1.0)(torch.zeros(1, 2))
