"""The short way: commands and functions call the scripts with the right arguments."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf.errors import ConfigKeyError

import dinov3
from dinov3.run import api, cli
from tests.helpers.images import write_image_folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What scripts were called with."""
    found: list[tuple[str, list[str]]] = []
    for module in (
        "dinov3.train.train",
        "dinov3.eval.knn",
        "dinov3.eval.linear",
        "dinov3.eval.finetune",
        "dinov3.run.explore",
    ):
        __import__(module)
        monkeypatch.setattr(f"{module}.main", lambda argv, module=module: found.append((module, list(argv))))
    return found


def test_alone_it_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(cli.COMMANDS)


@pytest.mark.parametrize("name", ["pretrain", "eval", "finetune", "predict"])
def test_help_shows_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    assert "examples:\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["export", "explore", "quickstart", "submit"])
def test_help_of_scripts_is_theirs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "usage:" in shown
    assert re.search(r"^examples:$|^ +(python -m )?dinov3", shown, re.MULTILINE)


def test_help_of_features_names_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["features", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "dataset=" in shown
    assert "shard_size" in shown


def test_pretrain_names_recipe_data_and_overrides(tmp_path: Path, calls: list[Any]) -> None:
    out = tmp_path / "run"
    assert cli.main(["pretrain", f"data={tmp_path}", f"out={out}", "model=vit_base", "optim.epochs=2"]) == 0
    ((module, argv),) = calls
    assert module == "dinov3.train.train"
    assert argv[0] == "--config-file"
    assert Path(argv[1]).is_file()
    assert argv[2:4] == ["--output-dir", str(out)]
    assert argv[4:] == [f"train.dataset_path=ImageFolder:root={tmp_path}", "student.arch=vit_base", "optim.epochs=2"]


def test_weights_choose_the_recipe_that_goes_on_from_them(tmp_path: Path, calls: list[Any]) -> None:
    assert dinov3.pretrain(tmp_path, tmp_path / "run", weights="w.pth") == tmp_path / "run" / "teacher_checkpoint.pth"
    ((_, argv),) = calls
    assert argv[1].endswith("continue_vits16.yaml")
    assert "student.pretrained_weights=w.pth" in argv


def test_evaluate_takes_a_run_or_a_hub_model(tmp_path: Path, calls: list[Any]) -> None:
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    assert cli.main(["eval", "knn", f"data={tmp_path}", "run=runs/a", "train.ks=[1]"]) == 0
    assert dinov3.evaluate("linear", data=tmp_path, model="dinov3_vits16", out="there") == Path("there")
    assert calls == [
        (
            "dinov3.eval.knn",
            [
                "model.config_file=runs/a/config.yaml",
                "model.pretrained_weights=runs/a/teacher_checkpoint.pth",
                f"train.dataset=ImageFolder:root={tmp_path}/train",
                f"eval.test_dataset=ImageFolder:root={tmp_path}/test",
                "output_dir=runs/a/eval_knn",
                "train.ks=[1]",
            ],
        ),
        (
            "dinov3.eval.linear",
            [
                "model.dino_hub=dinov3_vits16",
                f"train.dataset=ImageFolder:root={tmp_path}/train",
                f"train.val_dataset=ImageFolder:root={tmp_path}/test",
                "output_dir=there",
            ],
        ),
    ]


def test_finetune_takes_the_same(tmp_path: Path, calls: list[Any]) -> None:
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    assert cli.main(["finetune", f"data={tmp_path}", "out=tuned", "model=dinov3_vits16", "method=lora"]) == 0
    ((module, argv),) = calls
    assert module == "dinov3.eval.finetune"
    assert argv[0] == "model.dino_hub=dinov3_vits16"
    assert argv[-2:] == ["output_dir=tuned", "method=lora"]


def test_explore_passes_its_arguments_on(calls: list[Any]) -> None:
    assert cli.main(["explore", "a.png", "--model", "m"]) == 0
    assert calls == [("dinov3.run.explore", ["a.png", "--model", "m"])]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "no command 'train'"),
        (["pretrain", "out=a"], "data= must be given"),
        (["pretrain", "images"], "expected key=value"),
        (["pretrain", "data=/no/such", "out=a"], "no folder"),
        (["pretrain", "data=.", "out=a", "recipe=huge"], "vits16_image_folder"),
        (["eval", "svm", "data=.", "run=a"], "one of knn, linear"),
        (["eval", "knn", "data=.", "run=a", "model=b"], "either run="),
        (["eval", "knn", "data=/no/such", "run=a"], "needs the folders train and val"),
        (["predict", "poses", "--head", "a"], "one of segmentation"),
    ],
)
def test_errors_say_what_to_change(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


def test_unknown_keys_need_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(argv: list[str]) -> None:
        raise ConfigKeyError("unknown key 'tokns'; did you mean 'tokens'?")

    monkeypatch.setattr("dinov3.eval.features.main", refuse)
    assert cli.main(["features", "tokns=cls"]) == 2
    assert "did you mean 'tokens'?" in capsys.readouterr().err


def test_folders_with_colons_are_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    folder.mkdir()
    assert api.as_dataset(folder) == f'ImageFolder:root="{folder}"'
    assert api.as_dataset("ImageNet:split=TRAIN:root=x:extra=y") == "ImageNet:split=TRAIN:root=x:extra=y"


def test_importing_the_package_loads_no_task() -> None:
    code = "import dinov3, sys; assert not [m for m in sys.modules if m.startswith(('torch', 'dinov3.'))]"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dinov3.nothing  # noqa: B018


def test_four_commands_from_a_folder_to_an_exported_backbone(tmp_path: Path) -> None:
    for split, seed in (("train", 0), ("val", 1)):
        write_image_folder(tmp_path / "images" / split, classes=2, per_class=6, size=40, seed=seed)

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "dinov3", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
        return done.stdout

    small = ("train.OFFICIAL_EPOCH_LENGTH=2", "optim.epochs=1", "train.batch_size_per_gpu=4", "train.num_workers=0")
    run("pretrain", "data=images/train", "out=run", *small, "optim.warmup_epochs=0")
    sizes = ("transform.resize_size=32", "transform.crop_size=32", "train.num_workers=0", "eval.num_workers=0")
    run("eval", "knn", "data=images", "run=run", "train.ks=[1,2]", *sizes)
    run("export", "run", "backbone.safetensors")
    page = ("--config-file", "run/config.yaml", "--weights", "run/teacher_checkpoint.pth", "--image-size", "32")
    run("explore", "images/val", *page)

    assert (tmp_path / "run" / "eval_knn" / "results-knn.csv").exists()
    assert (tmp_path / "backbone.safetensors").stat().st_size > 100_000
    assert (tmp_path / "explore.html").exists()
