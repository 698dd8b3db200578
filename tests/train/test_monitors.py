"""Signs of collapse, online k-NN, and what is kept of a batch that gave no finite loss."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from dinov3.train.monitors import OnlineKnn, collapse_monitors
from dinov3.train.train import main
from tests.helpers import tiny_training
from tests.helpers.distributed import run_distributed
from tests.helpers.images import write_image_folder
from tests.helpers.tiny_training import with_output


def test_entropy_runs_from_one_prototype_per_image_to_all_images_alike() -> None:
    features = torch.randn(2, 8, 16)
    confident = torch.eye(8).repeat(2, 1, 1)
    uniform = torch.full((2, 8, 8), 1 / 8)
    assert collapse_monitors({"cls_centered": confident, "cls_pre_head": features})["teacher_entropy"] == 0
    entropy = collapse_monitors({"cls_centered": uniform, "cls_pre_head": features})["teacher_entropy"]
    assert entropy.item() == pytest.approx(math.log(8), rel=1e-5)


def test_feature_rank_counts_the_directions_in_use() -> None:
    targets = torch.full((2, 8, 4), 1 / 4)
    orthogonal = torch.linalg.qr(torch.randn(16, 16))[0]
    for rank in (1, 3):
        signs = torch.tensor([[(-1.0) ** (i >> r) for r in range(rank)] for i in range(16)])  # balanced: mean 0
        features = (signs @ orthogonal[:rank]).unflatten(0, (2, 8))
        measured = collapse_monitors({"cls_centered": targets, "cls_pre_head": features})["feature_rank"]
        assert measured.item() == pytest.approx(rank, rel=1e-3)
    collapsed = torch.ones(2, 8, 16)
    assert collapse_monitors({"cls_centered": targets, "cls_pre_head": collapsed})["feature_rank"] == pytest.approx(1)


def test_a_training_logs_its_monitors_and_its_online_knn(tmp_path: Path) -> None:
    arguments = tiny_training.prepare(tmp_path)
    images = f"ImageFolder:root={tmp_path / 'images'}"
    options = {"train_dataset": images, "val_dataset": images, "period": 5, "k": 1, "resize_size": 16, "crop_size": 16}
    overrides = [f"evaluation.online_knn.{key}={value}" for key, value in options.items()]
    main(with_output(arguments, tmp_path / "out", *overrides))
    rows = [json.loads(line) for line in (tmp_path / "out" / "training_metrics.json").read_text().splitlines()]
    assert "knn_top1" not in rows[0]
    assert 0 <= rows[-1]["knn_top1"] <= 100
    assert all(0 < row["teacher_entropy"] <= 1.001 * math.log(16) and row["feature_rank"] >= 1 for row in rows)


class Pixels(nn.Module):
    """A backbone whose features are the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) * self.scale


def online_knn_of_pixels(root: Path) -> float:
    options = {"train_dataset": f"ImageFolder:root={root}", "val_dataset": f"ImageFolder:root={root}", "k": 1}
    knn = OnlineKnn(options | {"batch_size": 2, "resize_size": 16, "crop_size": 16}, num_workers=0)
    return knn.evaluate(Pixels(), torch.float32)


def test_online_knn_finds_every_image_itself_on_any_number_of_processes(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "images", classes=3, per_class=3, size=24, seed=0)
    assert online_knn_of_pixels(tmp_path / "images") == 100
    assert run_distributed(online_knn_of_pixels, 2, tmp_path, tmp_path / "images") == [100, 100]


def test_the_batch_of_a_non_finite_iteration_is_kept(tmp_path: Path) -> None:
    arguments = tiny_training.prepare(tmp_path)
    # A mean of infinity makes every pixel infinite, and every loss NaN.
    with pytest.raises(RuntimeError, match="not finite at iteration 2"):
        main(with_output(arguments, tmp_path / "out", "crops.rgb_mean=[.inf,.inf,.inf]"))
    kept = torch.load(tmp_path / "out" / "nan_logs" / "batch_0_rank0.pth", weights_only=True)
    assert kept["collated_global_crops"].shape == (8, 3, 16, 16)
    assert not (tmp_path / "out" / "nan_logs" / "batch_1_rank0.pth").exists()
