"""The command: trains, tests, resumes, evaluates heads of all kinds, and says what is wrong with its arguments."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from dinov3.eval.depth import predict, run
from dinov3.eval.depth.metrics import METRICS
from dinov3.eval.helpers import cli_parser
from tests.eval.depth.toys import write_nyu
from tests.helpers.source import ROOT

CONFIGS = ROOT / "dinov3" / "eval" / "depth" / "configs"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a small backbone."""
    from dinov3.eval.depth.example import write_backbone

    config, weights = write_backbone(tmp_path_factory.mktemp("backbone"))
    return [f"model.config_file={config}", f"model.pretrained_weights={weights}"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, backbone: list[str]) -> Path:
    """The output folder of the published NYU command, shortened, on a tiny NYU."""
    root = tmp_path_factory.mktemp("nyu")
    write_nyu(root)
    out = root / "out"
    argv = [
        f"config={CONFIGS / 'config-nyu.yaml'}",
        f"datasets.root={root}",
        *backbone,
        f"--output-dir={out}",
        "scheduler.total_iter=4",
        "scheduler.constructor_kwargs.warmup_iters=1",
        "eval.eval_interval=2",
        "num_workers=0",
        "transforms.train.random_crop=[32,48]",
        "decoder_head.n_output_channels=8",
        "result_config.save_results=true",
    ]
    assert run.main(argv) == 0
    return out


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "results-depth.csv") as file:
        return list(csv.DictReader(file))


def test_the_published_training(trained: Path) -> None:
    (row,) = rows(trained)
    assert list(row) == [f"NYU_{name}" for name in METRICS]
    assert all(np.isfinite(float(value)) for value in row.values())
    names = {path.name for path in trained.iterdir()}
    assert {"depth_config.yaml", "model_00000002.pth", "model_00000004.pth", "model_final.pth", "head.pth"} <= names
    assert len(list((trained / "visualizations").glob("results_*.jpg"))) == 3
    written = OmegaConf.load(trained / "depth_config.yaml")
    assert (written.optimizer.beta2, written.decoder_head.backbone_out_layers) == (0.99, "LAST")
    assert written.scheduler.total_iter == 4


@pytest.mark.parametrize("file", ["model_final.pth", "model_00000004.pth", "head.pth", ""])
def test_a_trained_head_is_tested_again(file: str, trained: Path, backbone: list[str], tmp_path: Path) -> None:
    argv = [
        f"config={trained / 'depth_config.yaml'}",
        *backbone,
        f"load_from={trained / file}",
        f"output_dir={tmp_path}",
        "result_config.save_results=false",
    ]
    assert run.main(argv) == 0
    (row,), (before,) = rows(tmp_path), rows(trained)
    for name, value in before.items():
        assert float(row[name]) == pytest.approx(float(value), rel=1e-5), name
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize("entry", ["dinov3_vit7b16_dd", "dinov3_vitl16_chmv2"])
def test_hub_heads_are_tested(entry: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinov3.eval.depth.config import DecoderConfig
    from tests.eval.depth.toys import tiny_depther

    given: dict[str, Any] = {}

    def build(**kwargs: Any) -> Any:
        given.update(kwargs)
        depther = tiny_depther("dpt")
        depther.decoder_config = DecoderConfig(max_depth=77.0)  # type: ignore[assignment]
        return depther

    monkeypatch.setitem(run._HUB, entry, build)
    config = OmegaConf.load(trained / "depth_config.yaml")
    argv = [
        f"config={CONFIGS / 'config-nyu-synthmix-dpt-inference.yaml'}",
        f"datasets.root={config.datasets.root}",
        f"load_from={entry}",
        "head_weights=head.pth",
        "backbone_weights=backbone.pth",
        "transforms.eval.img_size=64",
        "num_workers=0",
        f"output_dir={tmp_path}",
    ]
    assert run.main(argv) == 0
    assert given == {"autocast_dtype": torch.float32, "weights": "head.pth", "backbone_weights": "backbone.pth"}
    assert OmegaConf.load(tmp_path / "depth_config.yaml").decoder_head.max_depth == 77.0
    assert rows(tmp_path)


def test_predictions_of_pictures(trained: Path, backbone: list[str], tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    (pictures / "below").mkdir(parents=True)
    for name, size in (("a.png", (50, 33)), ("below/b.jpg", (17, 90))):
        Image.new("RGB", size, (200, 30, 90)).save(pictures / name)
    (pictures / "broken.png").write_bytes(b"no image")
    weights = backbone[1].partition("=")[2]
    out = tmp_path / "out"
    argv = ["--head", str(trained), "--images", str(pictures), "--output-dir", str(out)]
    assert predict.main([*argv, "--backbone-weights", weights, "--tta", "--size", "48", "--device", "cpu"]) == 0
    for name, shape in (("a", (33, 50)), ("below/b", (90, 17))):
        depth = np.load(out / f"{name}_depth.npy")
        assert depth.shape == shape
        assert depth.dtype == np.float32
        assert 0.001 <= depth.min() <= depth.max() <= 10.0
        with Image.open(out / f"{name}_depth.png") as picture:
            assert picture.height > 300
    assert "broken.png" in (out / "skipped.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("decoder_head.n_bins=3", "unknown key 'decoder_head.n_bins'"),
        ("transforms.train.random_corp=[3,4]", "random_corp"),
        ("config=a.yaml config_file=b.yaml", "mean the same"),
        ("bs=2", "give a backbone"),
        ("model.dino_hub=dinov3_vits16 bs=many", "bs"),
        ("--fast", "expected key=value"),
    ],
)
def test_wrong_arguments(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run.check_arguments(arguments.split(), 1)


def test_values_of_the_command_line_win_over_those_of_the_file() -> None:
    argv = [f"config={CONFIGS / 'config-nyu.yaml'}", "model.dino_hub=dinov3_vits16", "optimizer.lr=5", "bs=3"]
    config = run.read_config(cli_parser(argv))
    assert (config.optimizer.lr, config.optimizer.beta2, config.bs, config.n_gpus) == (5.0, 0.99, 3, 8)
    assert config.transforms.train is not None
    assert list(config.transforms.train.random_crop or ()) == [416, 544]
    assert config.decoder_head.head_kwargs == {}


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_configuration_says_how_it_is_run_and_what_to_expect(name: str) -> None:
    text = (CONFIGS / name).read_text()
    header = "".join(line.lstrip("# ") for line in text.splitlines(keepends=True) if line.startswith("#"))
    command = header[header.index("python dinov3/eval/depth/run.py") :].split("output_dir=<OUT>")[0].split()[2:]
    run.check_arguments([word.replace("config=dinov3/", f"config={ROOT}/dinov3/") for word in command], 1)
    assert f"config=dinov3/eval/depth/configs/{name}" in command
    assert "Not reproduced here" in " ".join(header.split())


def test_help_shows_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "config-nyu.yaml" in shown
    assert "eval_interval: 1600" in shown


def test_commands_of_the_documents_are_understood() -> None:
    text = "".join((ROOT / name).read_text() for name in ("README.md", "docs/depth.md")).replace("\\\n", " ")
    commands = [line.split() for line in text.splitlines() if line.startswith("python dinov3/eval/depth/run.py")]
    assert len(commands) == 4
    for words in commands:
        argv = [word.replace("config=dinov3/", f"config={ROOT}/dinov3/") for word in words[2:]]
        run.check_arguments(argv, 1)
