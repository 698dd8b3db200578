"""The linear evaluation: resuming, checkpoints that remain, processes, choosing and testing heads."""

import json
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.checkpointer import CheckpointRetentionPolicy
from dinov3.data import register_dataset
from dinov3.distributed.stopping import PREEMPTED, Stopped
from dinov3.eval.config import TransformConfig
from dinov3.eval.features import ModelWithIntermediateLayers
from dinov3.eval.helpers import args_dict_to_dataclass
from dinov3.eval.linear import (
    Evaluator,
    LinearEvalConfig,
    OptimizerType,
    SchedulerType,
    TrainConfig,
    _file_name,
    eval_linear_with_model,
    train_linear_classifiers,
)
from dinov3.eval.linear_heads import AllClassifiers, setup_linear_classifiers
from dinov3.eval.metrics import ClassificationMetricType
from dinov3.eval.probe import average_gradients
from tests.eval.toys import MeanColour, VectorDataset, write_colour_folders
from tests.helpers.distributed import run_distributed

_ACCURACY = ClassificationMetricType.MEAN_ACCURACY


class _Layers(nn.Module):
    """Vectors as the tokens of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def get_intermediate_layers(self, x: Tensor, n: int, **_: Any) -> list[tuple[Tensor, Tensor]]:
        return [(x[:, None] * (i + 1) * self.scale, x * self.scale) for i in range(2)][-n:]


class _NoisyVectors(VectorDataset):
    """A train set with augmentation: every draw of an item differs."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        vector, label = super().__getitem__(index)
        return vector + 0.1 * torch.randn(vector.shape), label


def _offer_vectors() -> str:
    """A dataset string of vectors to evaluate on, registered once per process."""
    from dinov3.data.registry import dataset_names

    if "ToyVectors" not in dataset_names():

        def build(transform: Any = None, target_transform: Any = None, transforms: Any = None) -> VectorDataset:
            return VectorDataset(30, seed=1)

        register_dataset("ToyVectors", build, keys=())
    return "ToyVectors"


class _Interrupted(Exception):
    pass


def _train(
    folder: Path, stop_at: int | None = None, signal_at: int | None = None, **changes: Any
) -> tuple[dict[str, Tensor], Any]:
    """Train two heads for 12 iterations.

    `stop_at`: the process dies at the start of that step; `signal_at`: it gets the signal of a preemption then.
    """
    config = TrainConfig(
        dataset="-", val_dataset=_offer_vectors(), batch_size=8, num_workers=0, learning_rates=(0.5, 0.05),
        n_last_blocks_list=(1, 2), epochs=3, epoch_length=4,
        checkpoint_retention_policy=CheckpointRetentionPolicy.ALL,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(config, name, value)
    evaluator = _evaluator(config.val_dataset, folder)

    class Model(ModelWithIntermediateLayers):
        steps = 0

        def forward(self, images: Tensor) -> Any:
            self.steps += torch.is_grad_enabled()
            if stop_at is not None and self.steps == stop_at + 1:
                raise _Interrupted
            if torch.is_grad_enabled() and signal_at is not None and self.steps == signal_at + 1:
                signal.raise_signal(signal.SIGUSR2)
            return super().forward(images)

    torch.manual_seed(5)
    heads, best = train_linear_classifiers(
        feature_model=Model(_Layers(), 2, nullcontext),
        train_dataset=_NoisyVectors(50),
        train_config=config,
        training_num_classes=3,
        val_evaluator=evaluator,
        checkpoint_output_dir=folder / "checkpoints",
    )
    return heads.state_dict(), best


@pytest.mark.parametrize("optimizer", list(OptimizerType))
@pytest.mark.parametrize("scheduler", list(SchedulerType))
def test_an_interrupted_training_ends_where_the_other_does(
    tmp_path: Path, optimizer: OptimizerType, scheduler: SchedulerType
) -> None:
    changes = {"optimizer_type": optimizer, "scheduler_type": scheduler, "save_checkpoint_iterations": 3}
    whole, best = _train(tmp_path / "whole", **changes)
    with pytest.raises(_Interrupted):
        _train(tmp_path / "parts", stop_at=8, **changes)  # the newest checkpoint is that of iteration 5
    resumed, best_resumed = _train(tmp_path / "parts", **changes)
    assert best_resumed == best
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key


@pytest.mark.parametrize("stop_at", [0, 5, 10, 11])
def test_a_training_that_a_signal_stops_saves_and_goes_on(tmp_path: Path, stop_at: int) -> None:
    whole, best = _train(tmp_path / "whole")

    with pytest.raises(Stopped) as caught:
        _train(tmp_path / "parts", signal_at=stop_at, save_checkpoint_iterations=100)
    assert caught.value.code == PREEMPTED
    saved = sorted(path.name for path in (tmp_path / "parts/checkpoints").glob("[0-9]*"))
    assert saved == [str(stop_at)]
    resumed, best_resumed = _train(tmp_path / "parts", save_checkpoint_iterations=100)
    assert best_resumed == best
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert (tmp_path / "parts/checkpoints/final/checkpoint.pth").exists()


def test_a_training_that_starts_again_goes_on_rather_than_back_to_where_it_started_from(tmp_path: Path) -> None:
    whole, _ = _train(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole/checkpoints/3", tmp_path / "old/3")
    changes = {"classifier_fpath": str(tmp_path / "old"), "save_checkpoint_iterations": 2}
    with pytest.raises(_Interrupted):
        _train(tmp_path / "new", stop_at=3, **changes)  # it has saved iteration 5
    resumed, _ = _train(tmp_path / "new", stop_at=6, **changes)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def _train_to_a_signal(folder: Path, code: int) -> None:
    """One of two processes gets the signal; both stop."""
    with pytest.raises(Stopped) as caught:
        _train(folder, signal_at=4 if distributed.get_rank() else None)
    assert caught.value.code == code


def test_two_processes_stop_together(tmp_path: Path) -> None:
    run_distributed(_train_to_a_signal, 2, tmp_path, tmp_path / "out", PREEMPTED)
    (newest,) = (tmp_path / "out/checkpoints").glob("[4-6]")
    assert (newest / "checkpoint.pth").exists()


def test_files_without_a_scheduler_are_fast_forwarded(tmp_path: Path) -> None:
    whole, _ = _train(tmp_path / "whole")
    old = tmp_path / "whole/checkpoints/7/checkpoint.pth"
    saved = torch.load(old, weights_only=True)
    del saved["scheduler"]
    (tmp_path / "old/7").mkdir(parents=True)
    torch.save(saved, tmp_path / "old/7/checkpoint.pth")
    resumed, _ = _train(tmp_path / "new", classifier_fpath=str(tmp_path / "old"))
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, msg=key)


def test_a_finished_training_is_only_evaluated(tmp_path: Path) -> None:
    first, best = _train(tmp_path)
    final = tmp_path / "checkpoints/final/checkpoint.pth"
    written = final.stat().st_mtime_ns
    second, best_again = _train(tmp_path, stop_at=0)  # the first step would raise
    assert best_again == best
    assert final.stat().st_mtime_ns == written
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_checkpoints_of_another_training_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        _train(tmp_path, classifier_fpath=str(tmp_path / "nowhere"))
    (tmp_path / "bad/3").mkdir(parents=True)
    torch.save({"iteration": 3, "best_accuracy": 1.0, "head": {}}, tmp_path / "bad/3/checkpoint.pth")
    with pytest.raises(ValueError, match="lacks linear_classifiers, optimizer; it has iteration"):
        _train(tmp_path, classifier_fpath=str(tmp_path / "bad"))


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("ALL", ["3", "7", "best", "final"]),
        ("BEST", ["best"]),
        ("LAST", ["final"]),
        ("LAST_AND_BEST", ["best", "final"]),
        ("NONE", []),
    ],
)
def test_what_the_policy_keeps_remains(tmp_path: Path, policy: str, kept: list[str]) -> None:
    _train(tmp_path, checkpoint_retention_policy=CheckpointRetentionPolicy[policy])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == kept


def test_a_checkpoint_knows_the_evaluation_of_its_iteration(tmp_path: Path) -> None:
    _train(tmp_path)
    saved = torch.load(tmp_path / "checkpoints/3/checkpoint.pth", weights_only=True)
    first = json.loads((tmp_path / "results_eval_linear.json").read_text().splitlines()[1])
    assert saved["best_accuracy"] == pytest.approx(100 * first["best_classifier"]["accuracy"])
    assert saved["iteration"] == 3


def test_evaluations_may_come_before_the_first_checkpoint(tmp_path: Path) -> None:
    _train(tmp_path, eval_period_iterations=2, save_checkpoint_iterations=100)
    text = (tmp_path / "results_eval_linear.json").read_text()
    assert [line for line in text.splitlines() if line.startswith("iter")] == [
        f"iter: {n}" for n in (1, 3, 5, 7, 9, 12)
    ]


def _on_a_process(folder: Path) -> tuple[Any, Any, Tensor]:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, 10.0 * torch.distributed.get_rank()])
    average_gradients([parameter, nn.Parameter(torch.zeros(3))])  # the second one has no gradient
    return *_train(folder), parameter.grad


def test_processes_train_equal_heads(tmp_path: Path) -> None:
    (state, best, mean), (other_state, other_best, _) = run_distributed(_on_a_process, 2, tmp_path, tmp_path / "two")
    assert mean.tolist() == [1.0, 5.0]
    for key, value in state.items():
        assert torch.equal(other_state[key], value), key
    assert other_best == best
    assert (tmp_path / "two/results_eval_linear.json").read_text().count("iter: 12") == 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    write_colour_folders(folder / "train", 8)
    write_colour_folders(folder / "val", 5, seed=1)
    write_colour_folders(folder / "test", 2, seed=2)
    return folder


def _config(folders: Path, out: Path, **changes: Any) -> LinearEvalConfig:
    name = "ImageFolder:root={}/{}:index_cache=off"
    train: dict[str, Any] = {
        "dataset": name.format(folders, "train"), "val_dataset": name.format(folders, "val"), "batch_size": 8,
        "num_workers": 0, "learning_rates": [1e-4, 10.0], "epochs": 2, "epoch_length": 8,
    }  # fmt: skip
    arguments: dict[str, Any] = {
        "model": {},
        "train": train,
        "eval": {"test_datasets": [name.format(folders, "test")], "num_workers": 0},
        "transform": {"resize_size": 32, "crop_size": 32},
        "output_dir": str(out),
        "save_results": True,
    }
    for section, values in changes.items():
        arguments[section] = {**arguments.get(section, {}), **values} if isinstance(values, dict) else values
    return args_dict_to_dataclass(arguments, LinearEvalConfig, save_config=False)[0]


def _run(config: LinearEvalConfig) -> dict[str, Any]:
    return eval_linear_with_model(model=MeanColour(), autocast_dtype=torch.float32, config=config)


def test_colours_are_told_apart_and_files_have_safe_names(folders: Path, tmp_path: Path) -> None:
    config = _config(folders, tmp_path)
    results = _run(config)
    (test_name,) = config.eval.test_datasets
    assert list(results) == [f"{test_name}_accuracy", "best_classifier", f"{config.train.val_dataset}_accuracy"]
    assert results[f"{test_name}_accuracy"] == 100.0
    assert results["best_classifier"] == "classifier_1_blocks_avgpool_True_lr_0_31250"
    target = np.load(tmp_path / f"target_{_file_name(test_name)}.npy")
    assert target.tolist() == [0, 0, 1, 1, 2, 2]


def test_the_validation_set_may_be_tested_too(folders: Path, tmp_path: Path) -> None:
    name = f"ImageFolder:root={folders}/val:index_cache=off"
    results = _run(_config(folders, tmp_path, eval={"test_datasets": [name]}))
    assert list(results) == [f"{name}_accuracy", "best_classifier", f"{name}_mean_accuracy_accuracy"]


def test_without_test_sets_the_validation_set_comes_first(folders: Path, tmp_path: Path) -> None:
    config = _config(folders, tmp_path, eval={"test_datasets": []})
    assert list(_run(config)) == [f"{config.train.val_dataset}_accuracy", "best_classifier"]


def _evaluator(dataset_str: str, folder: Path) -> Evaluator:
    return Evaluator(
        batch_size=16,
        num_workers=0,
        transform_config=TransformConfig(),
        dataset_str=dataset_str,
        metric_type=_ACCURACY,
        training_num_classes=3,
        output_dir=str(folder),
        save_results=True,
    )


def _zero_heads() -> tuple[ModelWithIntermediateLayers, AllClassifiers]:
    feature_model = ModelWithIntermediateLayers(_Layers(), 1, nullcontext)
    heads, _ = setup_linear_classifiers(feature_model(torch.zeros(1, 6)), [1], [0.3, 0.2, 0.1], 256, 3)
    for parameter in heads.parameters():
        nn.init.zeros_(parameter)
    return feature_model, heads


def test_the_first_of_equal_heads_is_taken_even_if_none_is_ever_right(tmp_path: Path) -> None:
    feature_model, heads = _zero_heads()
    for head in heads.classifiers_dict.values():
        head.linear.bias.data = torch.tensor([0.0, -1.0, -2.0])  # class 0, always
    evaluator = _evaluator(_offer_vectors(), tmp_path)
    evaluator.dataset.targets = evaluator.dataset.targets.clamp(min=1)
    best = evaluator.evaluate(feature_model=feature_model, linear_classifiers=heads, iteration=0)
    assert best == ("classifier_1_blocks_avgpool_True_lr_0_30000", 0.0)
    assert np.load(tmp_path / "preds_ToyVectors.npy").shape == (30, 3)


def test_a_class_mapping_restricts_the_outputs(tmp_path: Path) -> None:
    """A data set whose classes 0 and 1 are the classes 2 and 0 of training."""
    feature_model, heads = _zero_heads()
    for head in heads.classifiers_dict.values():
        head.linear.bias.data = torch.tensor([1.0, 9.0, 0.0])  # class 1, which the data set lacks; then 0
    evaluator = _evaluator(_offer_vectors(), tmp_path)
    evaluator.class_mapping = [2, 0]
    evaluator.dataset.targets = (evaluator.dataset.targets > 0).long()
    best = evaluator.evaluate(feature_model=feature_model, linear_classifiers=heads, iteration=0)
    assert best.accuracy == pytest.approx(evaluator.dataset.targets.float().mean().item())
    assert np.load(tmp_path / "preds_ToyVectors.npy").shape == (30, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval": {"test_metric_types": ["AUROC", "AUROC"]}}, "2 entries for 1"),
        ({"eval": {"test_metric_types": ["IMAGENET_C_METRIC"]}}, "IMAGENET_C_METRIC is a vector or an error"),
        ({"train": {"val_metric_type": "PER_CLASS_ACCURACY"}}, "PER_CLASS_ACCURACY is a vector"),
    ],
)
def test_impossible_options_are_named(folders: Path, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _run(_config(folders, tmp_path, **changes))


def test_file_names_stay_when_they_are_safe_and_differ_otherwise() -> None:
    assert _file_name("TEST") == "TEST"
    names = {_file_name(s) for s in ("A:root=/x/y", "A:root=/x_y", "A:root=/x:y")}
    assert len(names) == 3
    assert all("/" not in name and ":" not in name for name in names)
