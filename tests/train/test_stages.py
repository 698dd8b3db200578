"""The three stages of the 7B training with their own recipes, at tiny size: each loads what the one before wrote."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov3.checkpointer.weights import read_weights
from dinov3.train.ssl_meta_arch import SSLMetaArch
from tests.helpers import tiny_training

RECIPES = "dinov3/configs/train/dinov3_vit7b16_{}.yaml"
# The recipes, with another architecture, other sizes and shorter schedules.
TINY = [
    "compute_precision.param_dtype=fp32",
    "student.arch=vit_tiny_test",
    "student.patch_size=4",
    "student.fp8_enabled=false",
    "crops.local_crops_number=2",
    "train.batch_size_per_gpu=4",
    "train.num_workers=0",
    *(f"{head}.{key}" for head in ("dino", "ibot") for key in ("head_n_prototypes=16", "head_bottleneck_dim=8")),
    *(f"{head}.head_hidden_dim=24" for head in ("dino", "ibot")),
]
ONE_SIZE = ["crops.global_crops_size=16", "crops.local_crops_size=8", "train.OFFICIAL_EPOCH_LENGTH=2"]
ONE_SIZE += ["schedules.lr.warmup_epochs=1", "schedules.teacher_temp.warmup_epochs=1", "checkpointing.period=2"]
GRAM = ["optim.epochs=6", "crops.gram_teacher_crops_size=32", "gram.update_frequency=2", "gram.it_first_update=12"]
GRAM += ["dino.local_loss_weight_schedule.warmup_epochs=4", "gram.loss_weight_schedule.warmup_epochs=4"]
HIGH_RESOLUTION = ["train.OFFICIAL_EPOCH_LENGTH=1", "dino.koleo_distributed_loss_group_size=4"]
HIGH_RESOLUTION += ["crops.global_crops_size=[16,24,24,24,24]", "crops.local_crops_size=[8,8,12,8,12]"]
HIGH_RESOLUTION += ["crops.gram_teacher_crops_size=[24,36,36,36,36]"]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Output folders of the stages, the teachers they exported, and the crop sizes that the last one saw."""
    folder = tmp_path_factory.mktemp("stages")
    dataset = tiny_training.prepare(folder)[-1]
    sizes: set[tuple[int, ...]] = set()

    def run(recipe: str, output: str, *overrides: str) -> None:
        arguments = ["--config-file", RECIPES.format(recipe), "--output-dir", str(folder / output)]
        tiny_training.main([*arguments, dataset, *TINY, *overrides])

    def recording(self: SSLMetaArch, data: Any, **kwargs: Any) -> Any:
        sizes.add(tuple(data[f"collated_{kind}_crops"].shape[-1] for kind in ("global", "local", "gram_teacher")))
        return original(self, data, **kwargs)

    run("pretrain", "base", *ONE_SIZE, "optim.epochs=4")
    first = folder / "base" / "eval" / "training_7" / "sharded_teacher_checkpoint"
    teachers = [read_weights(first)]
    run("gram_anchor", "base", *ONE_SIZE, *GRAM, f"gram.ckpt={first}")
    second = folder / "base" / "eval" / "training_11" / "sharded_teacher_checkpoint"
    teachers.append(read_weights(second))
    original = SSLMetaArch.forward_backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SSLMetaArch, "forward_backward", recording)
        sources = [f"gram.ckpt={second}", f"student.resume_from_teacher_chkpt={second}"]
        run("high_res_adapt", "high", *HIGH_RESOLUTION, *sources)
    teachers.append(read_weights(folder / "high" / "teacher_checkpoint.pth"))
    return {"folder": folder, "teachers": teachers, "sizes": sizes}


def rows(folder: Path) -> dict[int, dict[str, Any]]:
    lines = (folder / "training_metrics.json").read_text().splitlines()
    return {row["iteration"]: row for row in map(json.loads, lines)}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Between the matrices of two backbones, relative to their size."""
    names = [key for key in a if key.endswith(("qkv.weight", "w3.weight", "proj.weight"))]
    gap, size = (
        torch.stack([x.norm() for x in xs]).norm() for xs in ([a[k] - b[k] for k in names], [a[k] for k in names])
    )
    return float(gap / size)


def test_gram_anchoring_goes_on_counting_where_pretraining_stopped(stages: dict[str, Any]) -> None:
    found = rows(stages["folder"] / "base")
    assert list(found) == [0, 7, 10, 11]
    assert "gram_loss" not in found[7]
    assert found[11]["gram_loss"] > 0
    first, second, _ = stages["teachers"]
    assert distance(first, second) < 0.05
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], second["blocks.0.attn.qkv.weight"])


def test_the_gram_teacher_is_the_one_of_pretraining_until_it_is_refreshed(stages: dict[str, Any]) -> None:
    first, second, _ = stages["teachers"]
    before, after = (
        read_weights(stages["folder"] / "base" / "ckpt" / name, network="gram_teacher") for name in ("9", "11")
    )
    assert all(torch.equal(before[key], first[key]) for key in first)
    assert all(torch.equal(after[key], second[key]) for key in second)


def test_the_last_stage_starts_anew_from_the_teacher_of_the_second_and_keeps_it_as_gram_teacher(
    stages: dict[str, Any],
) -> None:
    _, second, third = stages["teachers"]
    found = rows(stages["folder"] / "high")
    assert list(found) == [0, 10, 20, 29]
    assert all(row["gram_loss_weight"] == 1.5 for row in found.values())
    assert 0 < distance(second, third) < 0.05
    gram = read_weights(stages["folder"] / "high" / "ckpt" / "29", network="gram_teacher")
    assert all(torch.equal(gram[key], second[key]) for key in second)


def test_the_last_stage_mixes_resolutions(stages: dict[str, Any]) -> None:
    possible = {(16, 8, 24), (24, 8, 36), (24, 12, 36)}
    assert stages["sizes"] <= possible
    assert len(stages["sizes"]) > 1
