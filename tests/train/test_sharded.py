"""Sharded training on several processes computes what one process computes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import fill
from tests.helpers.distributed import run_distributed

B, GLOBAL_PX, LOCAL_PX, PATCH_PX, N_LOCAL = 8, 16, 8, 4, 2
OVERRIDES = {
    "compute_precision": {"param_dtype": "fp32"},
    # no random draws in the model, and every loss a mean over samples or images
    "student": {"arch": "vit_tiny_test", "patch_size": PATCH_PX, "drop_path_rate": 0.0, "n_storage_tokens": 1},
    "dino": {"head_n_prototypes": 16, "head_bottleneck_dim": 8, "head_hidden_dim": 24, "koleo_loss_distributed": True},
    "ibot": {"head_n_prototypes": 12, "head_bottleneck_dim": 8, "head_hidden_dim": 24},
    "crops": {"local_crops_number": N_LOCAL, "global_crops_size": GLOBAL_PX, "local_crops_size": LOCAL_PX},
    "gram": {"use_loss": True, "ema_teacher": True, "rep_update": False, "img_level": True},
    "optim": {"epochs": 4, "warmup_epochs": 1, "lr": 0.02, "layerwise_decay": 0.8},
    "train": {"OFFICIAL_EPOCH_LENGTH": 2, "compile": False, "checkpointing": True},
    "teacher": {"warmup_teacher_temp_epochs": 1, "momentum_teacher": 0.9},
}


def build_run(output_dir: Path, weights: Path | None, resume: bool = False) -> Any:
    """A training, with random weights or those of a file."""
    from omegaconf import OmegaConf

    from dinov3 import distributed
    from dinov3.configs import get_default_config
    from dinov3.train.loop import TrainingRun
    from dinov3.train.train import build_meta_arch
    from tests.helpers import tiny_training  # noqa: F401  (registers the architecture)

    torch.manual_seed(0)
    own = {"output_dir": str(output_dir), "batch_size_per_gpu": B // distributed.get_world_size()}
    cfg = OmegaConf.merge(get_default_config(), OVERRIDES, {"train": own})
    cfg.student.resume_from_teacher_chkpt = str(weights or "")
    return TrainingRun(cfg, build_meta_arch(cfg, multi_distillation=False), resume)


def batch_of_rank(iteration: int, rank: int, world: int) -> dict[str, Any]:
    """This rank's samples of a batch of B, and their masks."""
    own = slice(rank * B // world, (rank + 1) * B // world)

    def crops(name: str, n: int, side: int) -> Tensor:
        return fill.tensor(f"sharded.{name}{iteration}", (n, B, 3, side, side))[:, own].flatten(0, 1)

    n_patches = (GLOBAL_PX // PATCH_PX) ** 2
    masks = fill.tensor(f"sharded.masks{iteration}", (2, B, n_patches)) > 0.4
    masks[:, 3] = False
    masks = masks[:, own].flatten(0, 1)
    weights = (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]
    indices = masks.flatten().nonzero().flatten()
    return {
        "collated_global_crops": crops("global", 2, GLOBAL_PX),
        "collated_local_crops": crops("local", N_LOCAL, LOCAL_PX),
        "collated_masks": masks,
        "mask_indices_list": indices,
        "masks_weight": weights,
        "n_masked_patches": torch.tensor([len(indices)]),
    }


def train(weights: Path, output_dir: Path, first: int, last: int) -> dict[str, Any]:
    """Iterations [first, last) on every process that calls this, saved; whole tensors of what they end with."""
    from dinov3 import distributed
    from dinov3.train.loop import average_over_ranks

    rank, world = distributed.get_rank(), distributed.get_world_size()
    run = build_run(output_dir, weights, resume=True)
    assert run.start_iteration == first
    losses = []
    for iteration in range(first, last):
        metrics = average_over_ranks(run.step(iteration, batch_of_rank(iteration, rank, world)))
        losses.append({name: float(value) for name, value in metrics.items() if "batch_size" not in name})
    run.save(last - 1)
    run.saver.wait()
    params = dict(run.model.student.named_parameters())
    return {
        "losses": losses,
        "grads": {name: whole(param.grad) for name, param in params.items() if param.grad is not None},
        "teacher": {name: whole(value) for name, value in run.model.model_ema.state_dict().items()},
        "sharded": world > 1 and any(param.to_local().shape != param.shape for param in params.values()),
    }


def initial_weights(output_dir: Path) -> dict[str, Tensor]:
    """Whole tensors of a student that has not been trained."""
    return {name: whole(value) for name, value in build_run(output_dir, None).model.student.state_dict().items()}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def assert_close(got: Mapping[str, Tensor], want: Mapping[str, Tensor], rtol: float) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        gap = (got[name] - value).abs().max()
        assert gap <= rtol * value.abs().max() + 1e-7, f"{name}: {gap:.2e} of {value.abs().max():.2e}"


def per_image(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are means over images. The rank of the features depends on how many images a process has."""
    return {name: value for name, value in metrics.items() if name != "feature_rank"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights with activations and gradients of order one (those of fresh weights are badly scaled)."""
    folder = tmp_path_factory.mktemp("weights")
    student = build_run(folder, None).model.student
    state = {
        key: fill.weight(key, tuple(value.shape)) if key.rsplit(".", 1)[-1] not in fill.KEEP else value
        for key, value in student.state_dict().items()
    }
    torch.save({"teacher": state}, folder / "teacher_checkpoint.pth")
    return folder / "teacher_checkpoint.pth"


@pytest.fixture(scope="module")
def one_process(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What one process has after 1 and after 3 iterations."""
    return {n: train(weights, tmp_path_factory.mktemp("one"), 0, n) for n in (1, 3)}


@pytest.mark.parametrize("world", [2, 4])
def test_a_step_has_the_losses_gradients_and_weights_of_one_process(
    world: int, weights: Path, one_process: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    for result in run_distributed(train, world, tmp_path, weights, tmp_path, 0, 1):
        assert result["sharded"]
        assert per_image(result["losses"][0]) == pytest.approx(
            per_image(one_process[1]["losses"][0]), rel=1e-5, abs=1e-7
        )
        # Pixels that are one unit of their last place larger change the gradients of one process by 1.5e-4: queries and
        # keys are rotated in bfloat16.
        assert_close(result["grads"], one_process[1]["grads"], rtol=3e-4)
        assert_close(result["teacher"], one_process[1]["teacher"], rtol=1e-5)


@pytest.mark.parametrize("world", [1, 4])
def test_two_processes_save_and_another_number_goes_on(
    world: int, weights: Path, one_process: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    run_distributed(train, 2, tmp_path, weights, tmp_path / "out", 0, 2)
    for result in run_distributed(train, world, tmp_path, weights, tmp_path / "out", 2, 3):
        assert result["losses"][0] == pytest.approx(one_process[3]["losses"][2], rel=1e-4, abs=1e-7)
        assert_close(result["teacher"], one_process[3]["teacher"], rtol=1e-4)


def test_random_weights_are_those_of_one_process_and_no_shard_repeats_another(tmp_path: Path) -> None:
    alone = initial_weights(tmp_path / "alone")
    for several in run_distributed(initial_weights, 3, tmp_path, tmp_path / "several"):
        assert list(several) == list(alone)
        assert all(torch.equal(several[name], value) for name, value in alone.items())
    qkv = alone["backbone.blocks.0.attn.qkv.weight"]
    assert not torch.equal(*qkv.chunk(2)), "halves that two ranks would hold"


@pytest.mark.parametrize("world", [1, 2])
def test_accumulated_gradients_are_the_mean_over_the_parts(world: int, weights: Path, tmp_path: Path) -> None:
    for result in run_distributed(gradients_whole_and_in_parts, world, tmp_path, weights, tmp_path):
        assert_close(result["accumulated"], result["mean"], rtol=1e-5)


def gradients_whole_and_in_parts(weights: Path, output_dir: Path) -> dict[str, dict[str, Tensor]]:
    """Gradients of two accumulated parts, and the mean of those of each part alone."""
    from dinov3 import distributed
    from dinov3.data.collate import split_batch

    run = build_run(output_dir, weights)
    student = run.model.student
    batch = batch_of_rank(0, distributed.get_rank(), distributed.get_world_size()) | {"global_batch_size": B}

    def gradients(batch: Any, n_parts: int) -> dict[str, Tensor]:
        run.optimizer.zero_grad()
        run.n_parts = n_parts
        run._accumulate(0, batch, 0.06)
        return {name: whole(param.grad) for name, param in student.named_parameters() if param.grad is not None}

    first, second = (gradients(part, 1) for part in split_batch(batch, 2))
    return {
        "accumulated": gradients(batch, 2),
        "mean": {name: (first[name] + second[name]) / 2 for name in first},
    }
