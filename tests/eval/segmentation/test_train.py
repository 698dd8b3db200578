"""Training of both heads: exact resume, what is written, and the rules of a step."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dinov3.eval.segmentation import train
from dinov3.eval.segmentation.data import make_train_dataset, make_train_loader
from dinov3.eval.segmentation.train import (
    BestEvaluation,
    make_criterion,
    parameter_groups,
    set_train_mode,
    train_segmentation,
    train_step,
    validate,
)
from dinov3.eval.segmentation.weights import make_decoder
from tests.eval.segmentation.toys import M2F, configuration, small_arguments, tiny_backbone, write_ade20k

LINEAR = (
    "config=dinov3/eval/segmentation/configs/config-ade20k-linear-training.yaml",
    "scheduler.constructor_kwargs.warmup_iters=2",
    "train.checkpoint_interval=2",
)
LIKE_LINEAR_DATA = ("datasets.train=ADE20K:split=TRAIN", "datasets.val=ADE20K:split=VAL", "train.checkpoint_interval=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ade20k(tmp_path_factory.mktemp("ade20k"), n_train=3, n_val=2)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers.source import ROOT

    monkeypatch.chdir(ROOT)


class Killed(Exception):
    pass


@pytest.mark.parametrize("head", [LINEAR, (*M2F, *LIKE_LINEAR_DATA)], ids=["linear", "m2f"])
def test_an_interrupted_training_ends_with_the_same_head(
    head: tuple[str, ...], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = "scheduler.total_iter=3"
    whole = train_segmentation(tiny_backbone(), configuration(*head, *small_arguments(data, tmp_path / "whole"), steps))

    interrupted = configuration(*head, *small_arguments(data, tmp_path / "parts"), steps)
    step = train._Training.step

    def fails_once(self: Any, batch: Any) -> Any:
        if self.iteration == 2:  # after the checkpoint
            raise Killed
        return step(self, batch)

    monkeypatch.setattr(train._Training, "step", fails_once)
    with pytest.raises(Killed):
        train_segmentation(tiny_backbone(), interrupted)
    monkeypatch.setattr(train._Training, "step", step)
    torch.manual_seed(99)
    assert train_segmentation(tiny_backbone(), interrupted) == pytest.approx(whole, nan_ok=True, abs=0)
    first, second = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"] for name in ("whole", "parts")
    )
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    # And once more: nothing is trained again.
    monkeypatch.setattr(train._Training, "step", lambda *_: pytest.fail("trained"))
    assert train_segmentation(tiny_backbone(), interrupted) == pytest.approx(whole, nan_ok=True, abs=0)


def test_what_a_training_leaves(data: Path, tmp_path: Path) -> None:
    config = configuration(*LINEAR, *small_arguments(data, tmp_path))
    metrics = train_segmentation(tiny_backbone(), config)
    assert list(metrics) == ["mIoU", "acc", "aAcc", "dice", "fscore", "precision", "recall"]
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert set(saved) == {"model", "optimizer"}
    prefix = "segmentation_model.1."
    norm = {f"batchnorm_layer.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert set(saved["model"]) == {prefix + key for key in (*norm, "conv.weight", "conv.bias")}
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found >= {"head.pth", "results-per-class.csv", "pictures/0000.png", "checkpoints/final/checkpoint.pth"}
    rows = (tmp_path / "results-per-class.csv").read_text().splitlines()
    assert rows[0] == "class,name,IoU,acc,dice,precision,pixels"
    assert sum(int(row.split(",")[-1]) for row in rows[1:]) == 2 * 63 * 96  # all but the unlabelled rows


def test_the_backbone_stays_as_it_was(data: Path, tmp_path: Path) -> None:
    backbone = tiny_backbone()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    config = configuration(*M2F, *LIKE_LINEAR_DATA, *small_arguments(data, tmp_path), "scheduler.total_iter=1")
    train_segmentation(backbone, config)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert not backbone.training


@pytest.mark.parametrize("head", [LINEAR, (*M2F, *LIKE_LINEAR_DATA)], ids=["linear", "m2f"])
def test_steps_use_the_rate_of_the_step_before(head: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    config = configuration(*head, *small_arguments(data, tmp_path), "bs=1")
    decoder = make_decoder(tiny_backbone(), config)
    optimizer = torch.optim.AdamW(parameter_groups(decoder, config.decoder_head.type, 0.1), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k)
    loader = make_train_loader(make_train_dataset(config), batch_size=1, num_workers=0, seed=0)
    set_train_mode(decoder)
    rates = []
    for k in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        loss = train_step(
            decoder, next(loader), "cpu", None, optimizer, 1.0, scheduler, make_criterion(config), torch.float32, k
        )
        assert loss.ndim == 0
        assert not loss.requires_grad
    assert rates == [1.0, 1.0, 0.5]


def test_gradients_are_clipped_together() -> None:
    layer = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    before = torch.cat([p.detach().clone().flatten() for p in layer.parameters()])
    loss = 1000 * layer(torch.ones(1, 1)).sum()
    train.update(loss, list(layer.parameters()), optimizer, scheduler, gradient_clip=0.5, global_step=0)
    moved = torch.cat([p.detach().flatten() for p in layer.parameters()]) - before
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-4)


def test_norms_and_embeddings_of_mask2former_do_not_decay(data: Path, tmp_path: Path) -> None:
    config = configuration(*M2F, *LIKE_LINEAR_DATA, *small_arguments(data, tmp_path))
    decoder = make_decoder(tiny_backbone(), config)
    decayed, spared = parameter_groups(decoder, "m2f", 0.05)
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    spared_names = {names[id(parameter)] for parameter in spared["params"]}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert {"segmentation_model.1.predictor.query_feat.weight", "segmentation_model.0.level_embed"} <= spared_names
    assert "segmentation_model.1.predictor.class_embed.weight" not in spared_names
    n_trained = sum(parameter.requires_grad for parameter in decoder.parameters())
    assert len(decayed["params"]) + len(spared["params"]) == n_trained


def test_the_best_evaluation_is_kept() -> None:
    best, areas = BestEvaluation(), torch.ones(1, 4, 2)
    assert best.offer({"mIoU": math.nan}, areas, "mIoU")
    assert best.offer({"mIoU": 3.0}, 2 * areas, "mIoU")
    assert not best.offer({"mIoU": 3.0}, areas, "mIoU")
    assert not best.offer({"mIoU": math.nan}, areas, "mIoU")
    other = BestEvaluation()
    other.load_state_dict(best.state_dict())
    assert (other.metrics, float(other.areas.max())) == ({"mIoU": 3.0}, 2.0)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="metric_to_save is one of mIoU, got 'accuracy'"):
        best.offer({"mIoU": 1.0}, areas, "accuracy")


def test_validation_compares_with_the_best_so_far(data: Path, tmp_path: Path) -> None:
    from dinov3.eval.segmentation.data import make_eval_dataset, make_eval_loader

    config = configuration(*LINEAR, *small_arguments(data, tmp_path))
    decoder = make_decoder(tiny_backbone(), config)
    loader = make_eval_loader(make_eval_dataset(config, img_size=64, use_tta=False), num_workers=0)
    rest: Any = ("cpu", torch.float32, 64, 43, "linear", 4, 0, "mIoU")
    better, metrics = validate(decoder, loader, *rest, -1.0)
    assert better
    assert not validate(decoder, loader, *rest, metrics["mIoU"])[0]
    assert decoder.segmentation_model[1].training
    assert not decoder.segmentation_model[0].training or not decoder.segmentation_model[0].feature_model.training


def test_other_heads_are_named(data: Path, tmp_path: Path) -> None:
    config = configuration(*LINEAR, *small_arguments(data, tmp_path), "decoder_head.type=unet")
    with pytest.raises(ValueError, match="'linear' or 'm2f', got 'unet'"):
        train_segmentation(tiny_backbone(), config)
    with pytest.raises(ValueError, match="'linear' or 'm2f', got 'unet'"):
        make_criterion(config)


@pytest.mark.slow
def test_a_tiny_mask2former_learns_eight_images_by_heart(tmp_path: Path) -> None:
    import dinov3.hub
    from dinov3.eval.segmentation.eval import test_segmentation

    data = write_ade20k(tmp_path / "data", n_train=8, n_val=1, size=(64, 64))
    more = (
        "datasets.train=ADE20K:split=TRAIN",
        "datasets.val=ADE20K:split=TRAIN",
        "bs=4",
        "scheduler.total_iter=150",
        "decoder_head.hidden_dim=64",
        "train.m2f.n_points=400",
        "optimizer.lr=1e-3",
        "optimizer.gradient_clip=1.0",
        "eval.eval_interval=150",
        "transforms.train.flip_prob=0",
    )
    config = configuration(*M2F, *small_arguments(data, tmp_path / "out"), *more)
    metrics = train_segmentation(tiny_backbone(), config)
    assert metrics["mIoU"] > 90
    for file in ("head.pth", "model_final.pth"):
        config.load_from = str(tmp_path / "out" / file)
        assert test_segmentation(tiny_backbone(), config)["mIoU"] > 90
    model = dinov3.hub.load_head(tmp_path / "out", backbone=tiny_backbone())
    assert model.head_file.config["decoder"]["hidden_dim"] == 64  # type: ignore[union-attr]
