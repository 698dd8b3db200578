"""The commands: as published, at tiny size; evaluation of every kind of head file; two processes; wrong settings."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from dinov3.checkpointer.heads import read_head, save_head
from dinov3.eval.helpers import cli_parser
from dinov3.eval.segmentation import run
from dinov3.eval.segmentation.eval import evaluate_segmentation_model, test_segmentation
from dinov3.eval.segmentation.models import head_state
from dinov3.eval.segmentation.run import benchmark_launcher, main, run_segmentation_with_dinov3
from dinov3.eval.segmentation.weights import make_decoder, save_segmentation_head
from tests.eval.segmentation.toys import (
    M2F,
    configuration,
    register_tiny_backbone,
    small_arguments,
    tiny_backbone,
    write_ade20k,
)
from tests.helpers.distributed import run_distributed
from tests.helpers.source import ROOT

CONFIGS = "dinov3/eval/segmentation/configs"
LINEAR = f"config={CONFIGS}/config-ade20k-linear-training.yaml"
VAL = "datasets.val=ADE20K:split=VAL"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ade20k(tmp_path_factory.mktemp("ade20k"), n_train=3, n_val=3)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def _results(folder: Path) -> dict[str, str]:
    with open(folder / "results-semantic-segmentation.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    return row


def test_the_published_training_command(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_tiny_backbone(monkeypatch, tmp_path)
    published = f"model.dino_hub=dinov3_vit7b16 {LINEAR} datasets.root={data} --output-dir {tmp_path / 'out'}".split()
    tiny = [a for a in small_arguments(data, tmp_path) if not a.startswith(("datasets.root", "--output-dir"))]
    assert main([*published, *tiny, "scheduler.constructor_kwargs.warmup_iters=2"]) == 0
    assert list(_results(tmp_path / "out")) == ["mIoU", "acc", "aAcc", "dice", "fscore", "precision", "recall"]
    written = OmegaConf.load(tmp_path / "out" / "segmentation_config.yaml")
    assert (written.bs, written.scheduler.total_iter, written.decoder_head.num_classes) == (2, 6, 4)
    assert written.scheduler.constructor_kwargs.final_div_factor == float("inf")
    assert not (tmp_path / "out" / "eval_config.yaml").exists()
    head_file = read_head(tmp_path / "out")
    assert (head_file.backbone, head_file.config["decoder"]["num_classes"]) == ("dinov3_vit7b16", 4)
    assert head_file.mean == pytest.approx((0.485, 0.456, 0.406))


def test_the_published_evaluation_command(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinov3.hub import segmentors

    config = configuration(*M2F, *small_arguments(data, tmp_path), "decoder_head.num_classes=150")
    asked: list[Any] = []

    def released(**options: Any) -> Any:
        asked.append(options)
        return make_decoder(tiny_backbone(), config)

    monkeypatch.setattr(segmentors, "dinov3_vit7b16_ms", released)
    published = [f"config={CONFIGS}/config-ade20k-m2f-inference.yaml", f"datasets.root={data}"]
    published += ["load_from=dinov3_vit7b16_ms", "--output-dir", str(tmp_path)]
    tiny = ["eval.crop_size=64", "eval.stride=43", "transforms.eval.tta_ratios=[0.9,1.0]", "num_workers=0"]
    assert main([*published, *tiny, "eval.n_pictures=1"]) == 0
    assert asked == [{"autocast_dtype": torch.float32}]
    assert 0 <= float(_results(tmp_path)["aAcc"]) <= 100
    assert (tmp_path / "pictures" / "0000.png").is_file()


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / CONFIGS).glob("*.yaml")))
def test_every_configuration_knows_its_keys(name: str, tmp_path: Path) -> None:
    config = configuration(f"config={CONFIGS}/{name}", f"datasets.root={tmp_path}", f"output_dir={tmp_path}")
    assert config.decoder_head.num_classes == 150
    text = (ROOT / CONFIGS / name).read_text()
    assert f"{CONFIGS}/{name}" in text
    assert "Not" in text
    assert "reproduced here" in text


@pytest.mark.parametrize("head", ["linear", "m2f"])
def test_every_kind_of_head_file_is_evaluated_alike(head: str, data: Path, tmp_path: Path) -> None:
    more = M2F if head == "m2f" else ("decoder_head.type=linear",)
    config = configuration(*more, *small_arguments(data, tmp_path), VAL)
    decoder = make_decoder(tiny_backbone(), config).eval()
    state = {key: value.clone() for key, value in head_state(decoder).items()}
    torch.save({"model": state, "optimizer": {}}, tmp_path / "training.pth")
    torch.save(state, tmp_path / "flat.pth")
    torch.save(decoder.state_dict(), tmp_path / "with_backbone.pth")
    save_segmentation_head(tmp_path, state, config, ["a", "b", "c", "d"])
    results = []
    sources = ("training.pth", "flat.pth", "with_backbone.pth", "head.pth", "")
    for source in sources if head == "linear" else sources[1:4:2]:  # Mask2Former takes seconds
        config.load_from = str(tmp_path / source)
        results.append(run_segmentation_with_dinov3(tiny_backbone(), config))
    assert all(result == pytest.approx(results[0], nan_ok=True) for result in results)
    # A head file says itself what it is.
    defaults = configuration(*small_arguments(data, tmp_path), VAL, f"load_from={tmp_path / 'head.pth'}")
    defaults.decoder_head.num_classes, defaults.decoder_head.hidden_dim = 17, 2048
    assert test_segmentation(tiny_backbone(), defaults) == pytest.approx(results[0], nan_ok=True)


def test_heads_that_do_not_fit_are_named(data: Path, tmp_path: Path) -> None:
    config = configuration("decoder_head.type=linear", *small_arguments(data, tmp_path), VAL)
    state = head_state(make_decoder(tiny_backbone(), config))
    missing = {key: value for key, value in state.items() if not key.endswith("conv.bias")}
    torch.save({"model": missing}, tmp_path / "missing.pth")
    torch.save({"model": {**state, "segmentation_model.1.extra": torch.ones(1)}}, tmp_path / "extra.pth")
    for name, message in (("missing", "1 missing: segmentation_model.1.conv.bias"), ("extra", "1 unexpected")):
        config.load_from = str(tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=message):
            test_segmentation(tiny_backbone(), config)
    with pytest.raises(ValueError, match="is a head without its backbone"):
        test_segmentation(None, config)
    path = save_segmentation_head(tmp_path, dict(state), config, [])
    from dataclasses import replace

    save_head(path, replace(read_head(path), task="depth"))
    config.load_from = str(path)
    with pytest.raises(ValueError, match="is a head for depth, expected segmentation"):
        test_segmentation(tiny_backbone(), config)


def _evaluate(data: Path, folder: Path, *runs: tuple[str, ...]) -> list[dict[str, float]]:
    return [_evaluate_one(data, folder, arguments) for arguments in runs]


def _evaluate_one(data: Path, folder: Path, arguments: tuple[str, ...]) -> dict[str, float]:
    config = configuration("decoder_head.type=linear", *small_arguments(data, folder), VAL, *arguments)
    config.load_from = str(folder / "head.pth")
    return test_segmentation(tiny_backbone(), config)


def test_two_processes_measure_what_one_does(data: Path, tmp_path: Path) -> None:
    runs = [("eval.use_tta=true",), ("eval.compute_metric_per_image=true",)]
    config = configuration("decoder_head.type=linear", *small_arguments(data, tmp_path), VAL)
    save_segmentation_head(tmp_path, head_state(make_decoder(tiny_backbone(), config)), config, [])
    alone = _evaluate(data, tmp_path, *runs)
    for both in run_distributed(_evaluate, 2, tmp_path, data, tmp_path, *runs):
        for got, expected in zip(both, alone, strict=True):
            assert got == pytest.approx(expected, nan_ok=True)


def test_whole_images_and_labels_as_they_are(data: Path, tmp_path: Path) -> None:
    config = configuration("decoder_head.type=linear", *small_arguments(data, tmp_path), VAL)
    save_segmentation_head(tmp_path, head_state(make_decoder(tiny_backbone(), config)), config, [])
    slide = _evaluate_one(data, tmp_path, ())
    whole = _evaluate_one(data, tmp_path, ("eval.mode=whole", "eval.crop_size=null", "eval.stride=null"))
    assert whole != slide
    unreduced = _evaluate_one(data, tmp_path, ("eval.reduce_zero_label=false",))
    assert unreduced != slide


class Constant:
    """Predicts class 1 everywhere, at any size."""

    def predict(self, x: torch.Tensor, rescale_to: Any) -> torch.Tensor:
        scores = torch.zeros(len(x), 3, *rescale_to)
        scores[:, 1] = 1
        return scores


def test_odd_images_are_evaluated() -> None:
    views = [torch.zeros(1, 3, 5, 70)]
    label = torch.ones(1, 1, 9, 131, dtype=torch.uint8)
    metrics = evaluate_segmentation_model(
        Constant(),
        [(views, (torch.tensor([0]), label))],
        "cpu",
        32,
        20,
        "linear",
        3,
        torch.bfloat16,
        reduce_zero_label=False,
    )
    assert metrics["aAcc"] == 100
    with pytest.raises(ValueError, match="no image to evaluate"):
        evaluate_segmentation_model(Constant(), [], "cpu", 32, 20, "linear", 3, torch.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("decoder_head.typ=linear",), ConfigKeyError, r"did you mean 'decoder_head\.type'"),
        (("config=a.yaml", "config_file=b.yaml"), ValueError, "got config= and config_file="),
        (("decoder_head.type=linear",), ValueError, "a head is trained on a backbone"),
        (("model_dtype=float16",), Exception, "FLOAT16"),
    ],
)
def test_wrong_settings_are_named(
    arguments: tuple[str, ...], error: type[Exception], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        benchmark_launcher(cli_parser([*small_arguments(data, tmp_path), *arguments]))


def test_files_come_below_the_command_line(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(run, "run_segmentation_with_dinov3", lambda _, config: found.append(config) or {"mIoU": 1.0})
    (tmp_path / "mine.yaml").write_text("bs: 7\nseed: 3\nmodel_dtype: bfloat16\n")
    arguments = [f"datasets.root={data}", "seed=4", f"--output-dir={tmp_path / 'out'}"]
    for key in ("config", "config_file"):
        benchmark_launcher(cli_parser([f"{key}={tmp_path / 'mine.yaml'}", *arguments]))
        assert (found[-1].bs, found[-1].seed, found[-1].num_workers, found[-1].model_dtype.name) == (
            7,
            4,
            6,
            "BFLOAT16",
        )
        assert (tmp_path / "out/segmentation_config.yaml").is_file()
        assert (tmp_path / "out/eval_config.yaml").is_file() == (key == "config_file")
    assert _results(tmp_path / "out") == {"mIoU": "1"}
