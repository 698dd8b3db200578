"""The training script on images that aren't a clean folder of RGB files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov3.train.train import main
from tests.data.datasets.test_skipped import write_messy_folder
from tests.helpers import tiny_training
from tests.helpers.images import broken_images
from tests.helpers.tiny_training import with_output

SHORT = ("optim.epochs=2", "train.OFFICIAL_EPOCH_LENGTH=4", "evaluation.eval_period_iterations=0")


def last_loss(output_dir: Path) -> float:
    rows = (output_dir / "training_metrics.json").read_text().splitlines()
    return float(json.loads(rows[-1])["total_loss"])


def teacher(output_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(output_dir / "teacher_checkpoint.pth", weights_only=True)["teacher"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a tiny training, without its images."""
    return tiny_training.prepare(tmp_path_factory.mktemp("tiny"))[:-1]


@pytest.mark.parametrize("augmentation", ["pil", "tensor", "device"])
def test_a_messy_folder_is_trained_on_and_the_skipped_files_are_listed(
    config: list[str], tmp_path: Path, augmentation: str
) -> None:
    broken = write_messy_folder(tmp_path / "images", n_fine=6)
    images = f"train.dataset_path=ImageFolder:root={tmp_path}/images"
    workers = 0 if augmentation == "device" else 2
    options = (f"train.num_workers={workers}", f"crops.augmentation={augmentation}", images)
    main(with_output(config, tmp_path / "out", *SHORT, *options))
    assert np.isfinite(last_loss(tmp_path / "out"))
    lines = (tmp_path / "out" / "skipped_files.jsonl").read_text().splitlines()
    skipped = {json.loads(line)["file"] for line in lines}
    assert skipped == broken
    assert f"{len(broken_images())} images can't be read so far" in (tmp_path / "out" / "logs" / "log.txt").read_text()


def test_of_an_odd_number_of_local_crops_out_of_the_global_ones_the_last_is_left_out(tmp_path: Path) -> None:
    options = ("crops.localcrops_subset_of_globalcrops=true", "crops.local_crops_number=3", "optim.epochs=1")
    main(with_output(tiny_training.prepare(tmp_path), tmp_path / "out", *options, "train.OFFICIAL_EPOCH_LENGTH=2"))
    assert np.isfinite(last_loss(tmp_path / "out"))


def test_images_of_five_channels_from_weights_for_three(config: list[str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(8):
        np.save(tmp_path / "images" / f"{i}.npy", rng.integers(0, 2**16, (24, 24, 5), dtype=np.uint16))
    shape = {"n_storage_tokens": 1, "pos_embed_rope_rescale_coords": 2, "layerscale_init": 1e-5}
    rgb = tiny_training.vit_tiny_test(patch_size=4, **shape)
    rgb.init_weights()
    torch.save(rgb.state_dict(), tmp_path / "rgb.pth")
    options = (
        f"train.dataset_path=ImageFolder:root={tmp_path}/images:channels=5",
        f"student.pretrained_weights={tmp_path}/rgb.pth",
        "student.in_chans=5",
        "crops.rgb_mean=[0.5,0.5,0.5,0.5,0.5]",
        "crops.rgb_std=[0.25,0.25,0.25,0.25,0.25]",
        "optim.epochs=1",
        "train.OFFICIAL_EPOCH_LENGTH=2",
    )
    main(with_output(config, tmp_path / "out", *options))
    assert np.isfinite(last_loss(tmp_path / "out"))
    weight = teacher(tmp_path / "out")["backbone.patch_embed.proj.weight"]
    start = rgb.state_dict()["patch_embed.proj.weight"]
    assert weight.shape == (16, 5, 4, 4)
    # The EMA teacher has hardly moved from the inflated weights.
    torch.testing.assert_close(weight[:, :3], start * 3 / 5, atol=1e-2, rtol=0)
