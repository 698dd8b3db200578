"""Multi-distillation through the training script: two students on two processes, each with its own folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import tiny_training
from tests.helpers.distributed import run_distributed

STUDENTS = {"small": ("vit_tiny_test", 16), "wide": ("vit_tiny_wide_test", 24)}
LAST = tiny_training.N_ITERATIONS - 1


def train(arguments: list[str]) -> None:
    tiny_training.main(arguments)


def prepare(folder: Path) -> list[str]:
    """Files of a teacher, two students and what they share; returns the arguments without `--output-dir`."""
    _, tiny, dataset = tiny_training.prepare(folder)
    shared = Path(tiny).read_text().replace("student:", "student_of_the_teacher:").splitlines()
    (folder / "teacher.yaml").write_text(
        "student: {arch: vit_tiny_wide_test, patch_size: 4, n_storage_tokens: 2}\n"
        + "".join(f"{line}\n" for line in shared if line.startswith(("dino:", "ibot:")))
    )
    for name, (arch, _) in STUDENTS.items():
        (folder / f"{name}.yaml").write_text(f"student: {{arch: {arch}, patch_size: 4, drop_path_rate: 0.0}}\n")
    ranges = [
        f"{{name: {name}, config_path: {folder / name}.yaml, ranks_range: [{i}, {i + 1}]}}"
        for i, name in enumerate(STUDENTS)
    ]
    base = [line for line in shared if not line.startswith(("student_of", "  {arch"))]
    base += [
        "MODEL: {META_ARCHITECTURE: MultiDistillationMetaArch}",
        f"distillation: {{enabled: true, full_cfg_path: {folder / 'teacher.yaml'}, checkpoint_path: ignore}}",
        f"multidistillation: {{enabled: true, global_batch_size: 4, students: [{', '.join(ranges)}]}}",
    ]
    (folder / "base.yaml").write_text("\n".join(base) + "\n")
    return ["--multi-distillation", "--config-file", str(folder / "base.yaml"), dataset]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return prepare(tmp_path_factory.mktemp("multi"))


@pytest.fixture(scope="module")
def trained(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of an undisturbed multi-distillation."""
    folder = tmp_path_factory.mktemp("trained")
    run_distributed(train, 2, folder, ["--output-dir", str(folder / "out"), *arguments], init_group=False)
    return folder / "out"


def exported(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "teacher_checkpoint.pth", weights_only=True)["teacher"]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_metrics.json").read_text().splitlines()]


@pytest.mark.parametrize("name", STUDENTS)
def test_each_student_is_exported_and_measured_in_its_own_folder(trained: Path, name: str) -> None:
    state = exported(trained / name)
    assert state["backbone.cls_token"].shape[-1] == STUDENTS[name][1]
    assert all(value.isfinite().all() for value in state.values())
    assert [row["iteration"] for row in rows(trained / name)] == [0, 10, LAST]
    assert rows(trained / name)[0]["batch_size"] == 2  # of the 4 images, each process loads half
    assert (trained / name / "config.yaml").exists()


@pytest.mark.parametrize("name", STUDENTS)
def test_each_student_has_its_logs_those_of_losses_that_are_not_finite_too(trained: Path, name: str) -> None:
    suffix = "" if name == "small" else ".rank1"
    assert "Training" in (trained / name / "logs" / f"log.txt{suffix}").read_text()
    assert (trained / name / "nan_logs" / "logs" / f"log.txt{suffix}").exists()


def test_the_students_learn_different_things(trained: Path) -> None:
    losses = [rows(trained / name)[-1]["total_loss"] for name in STUDENTS]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", STUDENTS)
def test_checkpoints_hold_all_but_the_frozen_teacher(trained: Path, name: str) -> None:
    from dinov3.checkpointer.files import dcp_shapes

    saved = dcp_shapes(trained / name / "ckpt" / str(LAST))
    networks = {key.split(".")[1] for key in saved if key.startswith("model.")}
    assert networks >= {"student", "model_ema", "dino_loss", "ibot_patch_loss"}
    assert "teacher" not in networks


def test_a_stopped_multi_distillation_goes_on_as_if_nobody_had_stopped_it(
    trained: Path, arguments: list[str], tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "out")
    for name in STUDENTS:
        shutil.rmtree(tmp_path / "out" / name / "ckpt" / str(LAST))
        (tmp_path / "out" / name / "teacher_checkpoint.pth").unlink()
    run_distributed(train, 2, tmp_path, ["--output-dir", str(tmp_path / "out"), *arguments], init_group=False)
    for name in STUDENTS:
        before, after = exported(trained / name), exported(tmp_path / "out" / name)
        assert list(before) == list(after)
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert [row["total_loss"] for row in rows(trained / name)] == [
            row["total_loss"] for row in rows(tmp_path / "out" / name)
        ]
