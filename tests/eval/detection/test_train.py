"""Training, its files, and going on: resumed, on two processes, from another stage, and as a model that is used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov3.checkpointer.heads import read_head
from dinov3.eval.detection import example, predict, run
from dinov3.eval.detection.data import make_train_dataset, make_train_loader
from dinov3.eval.detection.metrics import FIGURES
from dinov3.eval.detection.models.detr import build_model
from dinov3.eval.detection.models.processor import head_state
from dinov3.eval.detection.recipe import DetectionConfig
from dinov3.eval.detection.run import benchmark_launcher, check_arguments, main, read_config
from dinov3.eval.detection.train import (
    DetectionTrainer,
    make_criterion,
    parameter_groups,
    schedule_lengths,
    start_from,
    train_detector,
)
from dinov3.eval.helpers import cli_parser
from dinov3.eval.pictures import as_picture
from dinov3.hub import load_head
from tests.eval.detection.tiny import tiny_backbone, tiny_config, tiny_detector
from tests.eval.detection.toy_coco import write_toy_coco
from tests.golden.fill import fill
from tests.helpers import tiny_detector as tiny_detector_hub
from tests.helpers.distributed import run_distributed

HEAD = {
    "hidden_dim": 32,
    "nheads": 4,
    "dim_feedforward": 48,
    "dec_layers": 2,
    "num_encoder_layers": 1,
    "decoder_rpe_hidden_dim": 16,
    "num_queries_one2one": 10,
    "num_queries_one2many": 6,
    "k_one2many": 2,
    "proposal_min_size": 12,
    "topk": 20,
}


def _arguments(root: Path, output_dir: Path, *more: str) -> list[str]:
    config, weights = root / "backbone.yaml", root / "backbone.pth"
    if not weights.is_file():
        example.write_backbone(root)
    return [
        f"model.config_file={config}",
        f"model.pretrained_weights={weights}",
        f"datasets.root={root}",
        "datasets.train=CocoDetection:split=train",
        "datasets.val=CocoDetection:split=train",
        *(f"head.{name}={value}" for name, value in HEAD.items()),
        "bs=2",
        "num_workers=0",
        "scheduler={epochs: 2, warmup_iters: 2, milestones: [1]}",
        "optimizer.lr=1e-3",
        "transforms.train={short_side: [40, 64], max_size: null}",
        "transforms.eval={short_side: 48, max_size: null}",
        "eval.n_pictures=1",
        f"output_dir={output_dir}",
        *more,
    ]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    write_toy_coco(root)
    return root


@pytest.fixture(scope="module")
def trained(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("trained")
    assert main(_arguments(toy, output_dir, "eval.eval_interval=2")) == 0
    return output_dir


def test_a_training_leaves_what_the_specification_lists(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"detection_config.yaml", "model_00000002.pth", "model_final.pth", "head.pth"} <= names
    assert {"results-detection.csv", "validation.jsonl", "training_metrics.json", "CocoDetection"} <= names
    final = torch.load(trained / "model_final.pth", weights_only=True)
    assert set(final) == {"model", "optimizer", "scheduler", "iteration"}
    assert final["iteration"] == 4
    assert not [key for key in final["model"] if "backbone" in key]
    folder = trained / "CocoDetection"
    figures = json.loads((folder / "results.json").read_text())
    assert len(figures) == 12
    header, row = (trained / "results-detection.csv").read_text().splitlines()
    assert header.split(",") == [f"CocoDetection_{name}" for name in FIGURES]
    assert [float(value) for value in row.split(",")] == list(figures.values())
    records = json.loads((folder / "predictions.json").read_text())
    assert {record["category_id"] for record in records} <= {3, 14, 54}
    assert {record["image_id"] for record in records} <= {1000, 1007, 1014, 1021}
    with Image.open(folder / "pictures" / "0.png") as picture:
        assert picture.width > 100
    assert [json.loads(line)["iteration"] for line in (trained / "validation.jsonl").read_text().splitlines()] == [2]


def _cut_after(n: int) -> Callable[..., dict[str, Tensor]]:
    step = DetectionTrainer.step

    def stopping(self: DetectionTrainer, batch: Any) -> dict[str, Tensor]:
        if self.iteration == n:
            raise KeyboardInterrupt
        return step(self, batch)

    return stopping


def test_an_interrupted_training_goes_on_to_the_same_head(
    toy: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = _arguments(toy, tmp_path, "eval.eval_interval=2")
    with monkeypatch.context() as patch:
        patch.setattr(DetectionTrainer, "step", _cut_after(3))
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    assert main(arguments) == 0
    want, got = (torch.load(folder / "model_final.pth", weights_only=True) for folder in (trained, tmp_path))
    assert all(torch.equal(got["model"][key], value) for key, value in want["model"].items())
    predictions = [(folder / "CocoDetection" / "predictions.json").read_text() for folder in (trained, tmp_path)]
    assert predictions[0] == predictions[1]


def test_a_trained_detector_is_tested_from_each_of_its_files(toy: Path, trained: Path, tmp_path: Path) -> None:
    want = json.loads((trained / "CocoDetection" / "results.json").read_text())
    for name in ("", "head.pth", "model_final.pth"):
        head = [] if name != "model_final.pth" else ["head.num_classes=55"]
        arguments = _arguments(toy, tmp_path / (name or "folder"), f"load_from={trained / name}", *head)
        assert main(arguments) == 0
        got = json.loads((tmp_path / (name or "folder") / "CocoDetection" / "results.json").read_text())
        assert got == want


def test_the_hubs_detector_is_tested(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tiny_detector_hub.small_hub(monkeypatch, tmp_path)
    arguments = [
        "load_from=dinov3_vit7b16_de",
        f"head_weights={files.head}",
        f"backbone_weights={files.backbone}",
        f"datasets.root={toy}",
        "datasets.val=CocoDetection:split=train",
        "transforms.eval.short_side=96",
        "num_workers=0",
        f"output_dir={tmp_path / 'out'}",
    ]
    assert main(arguments) == 0
    records = json.loads((tmp_path / "out" / "CocoDetection" / "predictions.json").read_text())
    assert {record["category_id"] for record in records} <= {3, 14, 54}  # not the other 77


def test_test_time_augmentation(toy: Path, trained: Path, tmp_path: Path) -> None:
    arguments = _arguments(toy, tmp_path, f"load_from={trained}")
    more = ["eval.use_tta=true", "eval.tta_short_sides=[40,64]", "eval.topk=200", "eval.n_pictures=0"]
    assert main([*arguments, *more]) == 0
    records = json.loads((tmp_path / "CocoDetection" / "predictions.json").read_text())
    assert 0 < len(records) <= 4 * 200
    assert not (tmp_path / "CocoDetection" / "pictures").exists()


def test_a_head_file_makes_a_detector(toy: Path, trained: Path) -> None:
    model = load_head(trained, backbone_weights=toy / "backbone.pth")
    assert not model.training
    head_file = model.head_file
    assert head_file.class_names[3] == "c3"
    assert head_file.class_names[4] == ""
    assert model.class_names == head_file.class_names
    with Image.open(toy / "train" / "1.png") as file:
        image = file.convert("RGB")
    found = predict.detect_image(model, image, score_threshold=0.0, keep_doubles=True)
    scores = [one["score"] for one in found]
    assert len(found) == 20
    assert scores == sorted(scores, reverse=True)
    merged = predict.detect_image(model, image, score_threshold=0.0)
    assert merged[0] == found[0]
    assert sum(one["score"] for one in merged) < sum(scores)  # boxes lie upon each other
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    again = predict.detect_image(model, pixels, score_threshold=0.0, keep_doubles=True)
    torch.testing.assert_close([one["box"] for one in again], [one["box"] for one in found])
    picture = predict.draw_objects(as_picture(image), found)
    assert picture.shape == (48, 64, 3)


def test_predict_writes_boxes_and_pictures(toy: Path, trained: Path, tmp_path: Path) -> None:
    arguments = ["--head", str(trained), "--images", str(toy / "train" / "1.png"), "--output-dir", str(tmp_path)]
    more = ["--backbone-weights", str(toy / "backbone.pth"), "--score-threshold", "0", "--short-side", "64"]
    assert predict.main([*arguments, *more]) == 0
    found = json.loads((tmp_path / "1.json").read_text())
    assert set(found[0]) == {"label", "name", "score", "box"}
    with Image.open(tmp_path / "1.png") as picture:
        assert picture.size == (64, 48)


def test_class_heads_start_anew_with_other_classes(tmp_path: Path) -> None:
    earlier, later = fill(tiny_detector()), tiny_detector(num_classes=9)
    fresh = later.class_embed[0].weight.clone()
    torch.save({"model": head_state(earlier)}, tmp_path / "stage1.pth")
    same = tiny_detector()
    start_from(same, str(tmp_path / "stage1.pth"))
    assert torch.equal(same.class_embed[0].weight, earlier.class_embed[0].weight)
    start_from(later, str(tmp_path / "stage1.pth"))
    assert torch.equal(later.class_embed[0].weight, fresh)
    assert torch.equal(later.bbox_embed[0].layers[0].weight, earlier.bbox_embed[0].layers[0].weight)
    with pytest.raises(ValueError, match=r"of another shape: .*query_embed"):
        start_from(tiny_detector(num_queries_one2one=3), str(tmp_path / "stage1.pth"))


def _losses_and_figures(root: str, output_dir: str) -> tuple[list[float], dict[str, float]]:
    """Of two iterations on a global batch of four, and of the evaluation after them."""
    from dinov3 import distributed
    from dinov3.eval.detection.data import open_dataset
    from dinov3.eval.detection.eval import evaluate_dataset, make_views
    from dinov3.eval.detection.train import one_to_one_queries, with_processor

    more = ["head.encoder_dropout=0.0", f"bs={4 // distributed.get_world_size()}"]
    plain = "transforms.train={short_side: [48, 48], max_size: null, crop_probability: 0, flip_probability: 0}"
    config = read_config(cli_parser(_arguments(Path(root), Path(output_dir), *more, plain)))
    torch.manual_seed(distributed.get_rank())  # the weights of rank 0 are those of all
    detector = build_model(fill(tiny_backbone()), tiny_config(num_classes=55, encoder_dropout=0.0))
    fill(detector)
    dataset = make_train_dataset(config)
    trainer = DetectionTrainer(detector, config, total=4, epoch=1)
    losses = []
    for _, batch in zip(range(2), make_train_loader(dataset, config), strict=False):
        loss = trainer.step(batch)["loss"]
        if distributed.get_world_size() > 1:
            torch.distributed.all_reduce(loss)
        losses.append(float(loss) / distributed.get_world_size())
    with one_to_one_queries(detector):
        views = make_views(config, 16)
        test_set = open_dataset(config.datasets.val, config)
        figures, records = evaluate_dataset(with_processor(detector, config), test_set, views)
    if distributed.is_main_process():
        assert len(records) == len({json.dumps(record) for record in records})
    return losses, figures


def test_two_processes_train_and_measure_as_one(toy: Path, tmp_path: Path) -> None:
    losses, figures = _losses_and_figures(str(toy), str(tmp_path))
    for other_losses, other_figures in run_distributed(_losses_and_figures, 2, tmp_path, str(toy), str(tmp_path)):
        assert other_losses == pytest.approx(losses, rel=1e-4)
        assert other_figures == pytest.approx(figures, abs=1e-9)


def test_norms_biases_and_position_networks_have_no_weight_decay() -> None:
    detector = tiny_detector()
    most, spared = parameter_groups(detector, 0.05, 0.0)
    assert (most["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in detector.named_parameters()}
    of = {names[id(p)] for p in spared["params"]}
    assert {"transformer.level_embed", "transformer.decoder.layers.0.norm1.weight", "class_embed.0.bias"} <= of
    assert "transformer.decoder.layers.0.cross_attn.cpb_mlp1.0.weight" in of
    assert "query_embed.weight" not in of
    assert not [name for name in of if name.startswith("backbone")]
    assert len(most["params"]) + len(of) == sum(p.requires_grad for p in detector.parameters())


def test_schedule() -> None:
    config = DetectionConfig(bs=4)
    config.scheduler.epochs, config.scheduler.warmup_iters, config.scheduler.milestones = 3.0, 4, [2.0]
    assert schedule_lengths(42, config) == (10, 30)
    assert schedule_lengths(3, config) == (1, 3)
    trainer = DetectionTrainer(tiny_detector(), config, total=30, epoch=10)
    rates = []
    for _ in range(30):
        rates.append(trainer.optimizer.param_groups[0]["lr"] / config.optimizer.lr)
        trainer.optimizer.step()
        trainer.scheduler.step()
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[19:22] == pytest.approx([1.0, 0.1, 0.1])
    config.scheduler.epochs = 0
    with pytest.raises(ValueError, match="epochs must be positive"):
        schedule_lengths(42, config)


def test_weights_follow_the_unit_of_the_boxes() -> None:
    config = DetectionConfig()
    absolute = make_criterion(config, tiny_config())
    relative = make_criterion(config, tiny_config(reparam=False))
    assert (absolute.costs.bbox, absolute.weights.bbox) == (1, 1)
    assert (relative.costs.bbox, relative.weights.bbox) == (5, 5)
    config.matcher = {"class": 1.0}
    assert make_criterion(config, tiny_config()).costs.giou == 2
    config.matcher = {"l1": 1.0}
    with pytest.raises(ValueError, match="unknown parts of matcher: l1; known: class, bbox, giou"):
        make_criterion(config, tiny_config())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["head.hiden_dim=3"], "unknown key 'head.hiden_dim'; did you mean 'hidden_dim'"),
        ([], "give the backbone"),
        (["config=a.yaml", "config_file=b.yaml"], "mean the same: give one"),
        (["model.dino_hub=dinov3_vits16", "head_weights=x"], "belong to load_from=dinov3_vit7b16_de"),
        (["model.dino_hub=dinov3_vits16", "optimiser.lr=1"], "unknown key"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_arguments(arguments, 1)


def test_too_few_classes_are_refused(toy: Path, tmp_path: Path) -> None:
    arguments = cli_parser(_arguments(toy, tmp_path, "head.num_classes=10"))
    with pytest.raises(ValueError, match=r"head\.num_classes=10, but .*instances_train\.json needs 55"):
        benchmark_launcher(arguments)


@pytest.mark.parametrize(
    "name", ["config-coco", "config-objects365-stage1", "config-objects365-stage2", "config-coco-stage3"]
)
def test_recipes_can_be_read(name: str) -> None:
    path = Path(run.__file__).parent / "configs" / f"{name}.yaml"
    config = read_config(cli_parser([f"config={path}", "model.dino_hub=dinov3_vits16"]))
    assert config.scheduler.epochs >= 1


@pytest.mark.slow
def test_a_detector_learns_eight_images_by_heart(tmp_path: Path) -> None:
    strings = example.make_example(tmp_path / "data", n_train=8, n_val=1)
    config, weights = example.write_backbone(tmp_path)
    model = [f"model.config_file={config}", f"model.pretrained_weights={weights}"]
    arguments = example.example_arguments(tmp_path, {"train": strings["train"], "val": strings["train"]}, model, 120)
    fixed = "transforms.train={short_side: [128, 128], max_size: null, crop_probability: 0, flip_probability: 0}"
    results = benchmark_launcher(cli_parser([*arguments, fixed, "bs=8", "eval.eval_interval=1000"]))
    assert results["CocoDetection_AP"] > 0.9


def test_the_example_makes_boxes_that_fit(tmp_path: Path) -> None:
    strings = example.make_example(tmp_path, n_train=3, n_val=1)
    assert strings["train"] == f'CocoDetection:split=train:root="{tmp_path}"'
    before = (tmp_path / "train" / "0000.png").stat().st_mtime_ns
    example.make_example(tmp_path, n_train=3, n_val=1)
    assert (tmp_path / "train" / "0000.png").stat().st_mtime_ns == before
    picture, things = example.compose(np.random.default_rng(5))
    assert picture.size == (128, 128)
    assert things
    for name, (left, top, width, height) in things:
        assert name in example.THINGS
        assert 0 <= left < left + width <= 128
        assert 0 <= top < top + height <= 128


def test_head_files_hold_plain_values_only(trained: Path) -> None:
    head_file = read_head(trained)
    assert head_file.task == "detection"
    assert head_file.config["category_ids"] == {"3": 3, "14": 14, "54": 54}
    assert head_file.config["head"]["num_classes"] == 55


def test_train_detector_takes_a_data_set_of_yours(toy: Path, tmp_path: Path) -> None:
    config = read_config(cli_parser(_arguments(toy, tmp_path, "datasets.val=''", "scheduler.epochs=0.5")))
    detector = build_model(tiny_backbone(), tiny_config(num_classes=55))
    model = train_detector(detector, config, backbone="dinov3_vits16", train_dataset=make_train_dataset(config))
    assert (tmp_path / "head.pth").is_file()
    assert not model.training
    assert detector.num_queries == 10
