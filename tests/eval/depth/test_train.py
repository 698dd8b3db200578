"""Training: it learns, resumes exactly, does not depend on the number of processes, leaves the backbone alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3 import distributed
from dinov3.checkpointer import CheckpointRetentionPolicy
from dinov3.checkpointer.heads import read_head
from dinov3.eval.depth.checkpoint_utils import find_latest_checkpoint
from dinov3.eval.depth.config import DepthConfig, TrainTransformConfig
from dinov3.eval.depth.data import make_train_dataset, make_train_loader
from dinov3.eval.depth.loss import SigLoss
from dinov3.eval.depth.metrics import calculate_depth_metrics
from dinov3.eval.depth.models import Depther
from dinov3.eval.depth.models.linear_head import resize
from dinov3.eval.depth.train import build_trainer, train_depther
from dinov3.eval.flat_checkpoints import FlatCheckpoints
from tests.eval.depth.toys import DPT, Scenes, tiny_config, tiny_depther, write_nyu
from tests.helpers.backbones import assert_states_equal
from tests.helpers.distributed import run_distributed


@torch.no_grad()
def abs_rel(depther: Depther, scenes: Scenes) -> float:
    depth = resize(depther.eval()(scenes.images), scenes.depths.shape[-2:])
    valid = torch.ones_like(scenes.depths, dtype=torch.bool)
    return calculate_depth_metrics(scenes.depths, depth, valid)["abs_rel"].item()


@pytest.mark.parametrize(("head", "iterations", "lr"), [("linear", 150, 3e-2), ("dpt", 130, 5e-3)])
def test_a_tiny_head_overfits_eight_images(head: str, iterations: int, lr: float, tmp_path: Path) -> None:
    scenes = Scenes(8)
    kwargs = {"head_kwargs": DPT | {"channels": 16}} if head == "dpt" else {}
    depther = tiny_depther(head, use_batchnorm=True, **kwargs)
    config = tiny_config(tmp_path)
    config.optimizer.lr = lr
    config.scheduler.type, config.scheduler.constructor_kwargs = "PolynomialLR", {}
    config.scheduler.total_iter = iterations
    trainer = build_trainer(depther, config)
    before = abs_rel(depther, scenes)
    for _ in range(iterations):
        trainer.train_on_batch(scenes.images, scenes.depths)
    after = abs_rel(depther, scenes)
    assert before > 0.3
    assert after < 0.05, f"{before} -> {after}"


def nyu_config(tmp_path: Path, out: str = "out", **options: Any) -> DepthConfig:
    config = tiny_config(tmp_path / out, **options)
    config.losses = {"SIGLOSS": 1.0, "GRADIENT_LOSS": 0.1}
    config.datasets.root = str(write_nyu(tmp_path / "nyu"))
    config.datasets.train, config.datasets.val = "NYU:split=TRAIN", "NYU:split=VAL"
    config.transforms.train = TrainTransformConfig(random_crop=(32, 48), fixed_crop="NYU")
    config.scheduler.type = "WarmupOneCycleLR"
    config.scheduler.constructor_kwargs = {"warmup_iters": 2}
    return config


def train(config: DepthConfig) -> Depther:
    return train_depther(tiny_depther("dpt", use_batchnorm=True), config, backbone="dinov3_vits16")


def checkpoint(path: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    return saved


def assert_equal(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert_equal(value, b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b


def test_files_and_exact_resume(tmp_path: Path) -> None:
    config = nyu_config(tmp_path)
    backbone_before = {k: v.clone() for k, v in tiny_depther("dpt").encoder.state_dict().items()}
    depther = train(config)
    assert_states_equal(depther.encoder.state_dict(), backbone_before)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.pth")) == [
        "head.pth",
        *(f"model_{n:08d}.pth" for n in (2, 4, 6)),
        "model_final.pth",
    ]
    whole = checkpoint(out / "model_final.pth")
    assert whole["iteration"] == 6
    assert_states_equal(whole["model"], depther.decoder.state_dict())
    assert_states_equal(read_head(out).head, whole["model"])
    validations = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in validations] == [2, 4, 6]

    # As if it had been killed during iteration 5: everything after the second checkpoint is gone.
    for name in ("model_final.pth", "model_00000006.pth", "head.pth"):
        (out / name).unlink()
    train(config)
    assert_equal(checkpoint(out / "model_final.pth"), whole)
    again = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    assert again == validations
    train(config)  # nothing is left to do
    assert_equal(checkpoint(out / "model_final.pth"), whole)


def test_checkpoints_of_the_published_code_are_continued(tmp_path: Path) -> None:
    config = nyu_config(tmp_path)
    train(config)
    out = tmp_path / "out"
    whole = checkpoint(out / "model_final.pth")
    for name in ("model_final.pth", "model_00000006.pth"):
        (out / name).unlink()
    old = checkpoint(out / "model_00000004.pth")
    torch.save({key: old[key] for key in ("model", "optimizer", "iteration")}, out / "model_00000004.pth")
    train(config)
    assert_equal(checkpoint(out / "model_final.pth"), whole)


def test_which_checkpoint_is_the_newest_and_broken_ones(tmp_path: Path) -> None:
    assert find_latest_checkpoint(tmp_path) is None
    for name in ("model_00000002.pth", "model_00000010.pth", "zzz.pth", "head.pth"):
        torch.save({"model": {}}, tmp_path / name)
    assert find_latest_checkpoint(tmp_path) == tmp_path / "model_00000010.pth"
    trainer = build_trainer(tiny_depther(), tiny_config(tmp_path))
    with pytest.raises(ValueError, match="model_00000010.pth lacks iteration, optimizer"):
        FlatCheckpoints(tmp_path, trainer.state(), CheckpointRetentionPolicy.ALL).resume()
    torch.save({"model": {}}, tmp_path / "model_final.pth")
    assert find_latest_checkpoint(tmp_path) == tmp_path / "model_final.pth"


def test_samples_are_functions_of_seed_and_iteration(tmp_path: Path) -> None:
    config = nyu_config(tmp_path)
    dataset = make_train_dataset(config)
    stream = iter(make_train_loader(dataset, config))
    batches = [next(stream) for _ in range(4)]
    later = next(iter(make_train_loader(dataset, config, done=3)))
    assert_equal(later, batches[3])
    assert not torch.equal(batches[0][0], batches[2][0])  # the same images again (4 images, 2 per batch), changed anew
    config.seed = 5
    other = next(iter(make_train_loader(dataset, config)))
    assert not torch.equal(other[0], batches[0][0])


def _train_on_ranks(iterations: int) -> tuple[dict[str, Tensor], list[float]]:
    """Scenes, shared out in order; without random changes, so that one process can see the same."""
    world, rank = distributed.get_world_size(), distributed.get_rank()
    depther = tiny_depther("dpt", use_batchnorm=True)
    if rank == 1:  # what rank 0 has counts
        torch.nn.init.normal_(depther.decoder.convs[0].conv.weight)  # type: ignore[union-attr,index,arg-type]
    trainer = build_trainer(depther, tiny_config(Path("unused")))
    scenes = Scenes(8)
    norms = []
    for step in range(iterations):
        picked = [(4 * step + i) % 8 for i in range(4)][rank::world]
        norms.append(trainer.train_on_batch(scenes.images[picked], scenes.depths[picked])["grad_norm"].item())
    return depther.decoder.state_dict(), norms


def test_one_and_two_processes_agree(tmp_path: Path) -> None:
    alone, norms = _train_on_ranks(4)
    ranks = run_distributed(_train_on_ranks, 2, tmp_path, 4)
    assert ranks[0][1] == pytest.approx(norms, rel=1e-3)
    for state, _ in ranks:
        for key, value in alone.items():
            torch.testing.assert_close(
                state[key], value, rtol=1e-3, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}"
            )


def test_the_loss_sees_the_crop_only(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.transforms.train = TrainTransformConfig(eval_mask="NYU_EIGEN")
    trainer = build_trainer(tiny_depther(), config)
    scenes = Scenes(2)
    outside = scenes.depths.clone()
    outside[..., 0, :] = 5e6
    first = trainer.train_on_batch(scenes.images, outside)["loss"]
    again = build_trainer(tiny_depther(), config).train_on_batch(scenes.images, scenes.depths)["loss"]
    torch.testing.assert_close(first, again)


def test_what_a_training_needs(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(ValueError, match=r"training needs datasets\.train"):
        make_train_dataset(config)
    config.datasets.train = "NYU:split=TRAIN"
    with pytest.raises(ValueError, match=r"training needs transforms\.train"):
        make_train_dataset(config)
    config.losses = None
    with pytest.raises(ValueError, match="expected at least one loss"):
        build_trainer(tiny_depther(), config)
    config.metrics = ["absrel"]
    with pytest.raises(ValueError, match="unknown metrics"):
        train_depther(tiny_depther(), config, backbone="x")


def test_the_losss_counter_is_fast_forwarded(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.losses = {"SIGLOSS": 1.0}
    trainer = build_trainer(tiny_depther(), config)
    trainer.fast_forward(5)
    assert [m.n_calls for m in trainer.loss.modules() if isinstance(m, SigLoss)] == [5]
