"""The published evaluation commands, on a tiny training output, and the models they can be given."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dinov3.hub.backbones
from dinov3.configs import DinoV3SetupArgs, setup_config
from dinov3.eval import knn, linear, log_regression
from dinov3.eval.config import ModelConfig
from dinov3.eval.setup import load_model_and_context, setup_and_build_model
from dinov3.models import build_model_from_cfg
from tests.eval.toys import write_colour_folders
from tests.helpers.distributed import run_distributed

_ROOT = Path(__file__).parents[2]
_OPTIONS = ["student.arch=vit_small", "crops.global_crops_size=32", "compute_precision.param_dtype=fp32"]


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An output directory of a training, with images beside it."""
    folder = tmp_path_factory.mktemp("training")
    out = folder / "out"
    out.mkdir()
    # Larger steps than a fresh model's 1e-5, so that its features tell images apart.
    args = DinoV3SetupArgs(config_file="", output_dir=str(out), opts=[*_OPTIONS, "student.layerscale=0.5"])
    model = build_model_from_cfg(setup_config(args), only_teacher=True)[0]
    torch.manual_seed(0)
    model.to_empty(device="cpu").init_weights()
    teacher = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    torch.save({"teacher": teacher | {"dino_head.last_layer.weight": torch.zeros(3)}}, out / "teacher_checkpoint.pth")
    write_colour_folders(folder / "train", 4)
    write_colour_folders(folder / "val", 2, seed=1)
    yield folder
    (out / "teacher_checkpoint.pth").unlink()  # 85 MB


def _arguments(training: Path, script_arguments: list[str]) -> list[str]:
    out = training / "out"
    return [
        f"model.config_file={out}/config.yaml",
        f"model.pretrained_weights={out}/teacher_checkpoint.pth",
        f"output_dir={out}",
        "transform.resize_size=32",
        "transform.crop_size=32",
        "train.num_workers=0",
        "eval.num_workers=0",
        f"train.dataset=ImageFolder:root={training}/train:index_cache=off",
        *script_arguments,
    ]


def _knn_arguments(training: Path) -> list[str]:
    return _arguments(
        training, [f"eval.test_dataset=ImageFolder:root={training}/val:index_cache=off", "train.ks=[1,5]"]
    )


_RESULTS = {"results-knn.csv", "results-log-regression.csv", "results-linear.csv"}


def _accuracies(training: Path) -> list[float]:
    header, values = (training / "out/results-knn.csv").read_text().splitlines()
    assert header == "1 Top 1,5 Top 1"
    return [float(value) for value in values.split(",")]


def test_knn_as_a_script_leaves_the_training_alone(training: Path) -> None:
    out = training / "out"
    before = (out / "config.yaml").read_bytes()
    (out / "logs").mkdir(exist_ok=True)
    (out / "logs/log.txt").write_text("of the training\n")
    environment = os.environ | {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "dinov3/eval/knn.py", *_knn_arguments(training)]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "config.yaml").read_bytes() == before
    log = (out / "logs/log.txt").read_text()
    assert log.startswith("of the training\n")
    assert "results written to" in log
    assert all(0 <= value <= 100 for value in _accuracies(training))
    assert len((out / "results_eval_knn.json").read_text().splitlines()) == 2
    assert (out / "eval_config.yaml").exists()


def _log_regression_arguments(training: Path) -> list[str]:
    test_dataset = f"eval.test_dataset=ImageFolder:root={training}/val:index_cache=off"
    return _arguments(training, [test_dataset, "train.tol=1e-3", "train.train_dtype=float32"])


def _linear_arguments(training: Path) -> list[str]:
    val_dataset = f"train.val_dataset=ImageFolder:root={training}/val:index_cache=off"
    return _arguments(training, [val_dataset, "train.batch_size=4", "train.epochs=1", "train.epoch_length=2"])


def _all_three(training: Path) -> None:
    for main, arguments in (
        (knn.main, _knn_arguments),
        (log_regression.main, _log_regression_arguments),
        (linear.main, _linear_arguments),
    ):
        assert main(arguments(training)) == 0


def test_all_commands_in_one_directory_alone_and_under_torchrun(training: Path, tmp_path: Path) -> None:
    out = training / "out"
    config = (out / "config.yaml").read_bytes()
    _all_three(training)
    tables = {name: (out / name).read_text() for name in _RESULTS}
    assert run_distributed(_all_three, 2, tmp_path, training, init_group=False) == [None, None]
    for name in _RESULTS - {"results-linear.csv"}:  # linear: a batch of two processes is another training
        numbers = [float(value) for value in (out / name).read_text().splitlines()[1].split(",")]
        assert numbers == pytest.approx([float(value) for value in tables[name].splitlines()[1].split(",")]), name
    header, values = (out / "results-linear.csv").read_text().splitlines()
    assert header == f"ImageFolder:root={training}/val:index_cache=off_accuracy,best_classifier"
    assert values.partition(",")[2].startswith("classifier_1_blocks_avgpool_True_lr_")
    assert (out / "config.yaml").read_bytes() == config


@pytest.mark.parametrize("script", [knn, linear, log_regression])
def test_help_shows_the_call_and_all_keys(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--help"]) == 0
    shown = capsys.readouterr().out
    name = script.__name__.rpartition(".")[2]
    assert f"python dinov3/eval/{name}.py output_dir=<OUT>" in shown
    assert "few_shot:\n  enable: false" in shown


def test_unknown_keys_of_the_training_are_errors_unless_allowed(training: Path, tmp_path: Path) -> None:
    config_file = tmp_path / "config.yaml"
    config_file.write_text((training / "out/config.yaml").read_text() + "studnet:\n  arch: vit_base\n")
    with pytest.raises(ValueError, match=r"studnet\.arch \(did you mean student\.arch"):
        setup_and_build_model(str(config_file))
    model, dtype = setup_and_build_model(str(config_file), allow_unknown_keys=True, surplus=1)
    assert model.embed_dim == 384
    assert dtype == torch.float32
    assert not model.training


def test_the_dtype_is_that_of_the_training(training: Path) -> None:
    config_file = str(training / "out/config.yaml")
    _, dtype = setup_and_build_model(config_file, opts=["compute_precision.param_dtype=bf16"])
    assert dtype == torch.bfloat16


def test_hub_models_come_from_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def entry(**kwargs: Any) -> nn.Module:
        asked.append(kwargs)
        return nn.Linear(2, 2).train()

    monkeypatch.setattr(dinov3.hub.backbones, "dinov3_vits16", entry)
    model, context = load_model_and_context(ModelConfig(dino_hub="dinov3_vits16"), "")
    assert (asked, context, model.training) == ([{}], {"autocast_dtype": torch.float}, False)
    load_model_and_context(ModelConfig(dino_hub="dinov3_vits16", pretrained_weights="/w.pth"), "")
    assert asked[-1] == {"weights": "/w.pth"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(), "either as model.dino_hub=<name> or as model.config_file"),
        (ModelConfig(dino_hub="dinov3_vits16", config_file="c.yaml"), "either as model.dino_hub"),
        (ModelConfig(dino_hub="dinov3_vitx16"), "no backbone of the hub; known: .*dinov3_vitl16"),
        (ModelConfig(dino_hub="resnet50"), "must name a dinov3 or dinov2 model, got 'resnet50'"),
        (ModelConfig(dino_hub="dinov2_vits14", pretrained_weights="w"), "can't be used"),
    ],
)
def test_contradictory_models_are_named(config: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model_and_context(config, "")
