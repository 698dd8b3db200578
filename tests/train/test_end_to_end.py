"""The training script, whole, on a CPU: what it leaves behind, and that stopping it loses nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.train.train import main
from tests.helpers import tiny_training
from tests.helpers.tiny_training import N_ITERATIONS, with_output


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_training.prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a training that nobody disturbed."""
    output_dir = tmp_path_factory.mktemp("undisturbed")
    main(with_output(arguments, output_dir))
    return output_dir


def teacher(output_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(output_dir / "teacher_checkpoint.pth", weights_only=True)["teacher"]


def losses(output_dir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output_dir / "training_metrics.json").read_text().splitlines()]
    timings = {"iter_time", "data_time"}
    return [
        {k: v for k, v in row.items() if k not in timings and not k.endswith(("_per_s", "_pct", "_s"))} for row in rows
    ]


def assert_same_training(one: Path, other: Path) -> None:
    assert [row["iteration"] for row in losses(one)] == [row["iteration"] for row in losses(other)]
    a, b = teacher(one), teacher(other)
    assert list(a) == list(b)
    assert all(torch.equal(a[key], b[key]) for key in a)
    for mine, theirs in zip(losses(one), losses(other), strict=True):
        for key in ("total_loss", "dino_global_crops_loss", "ibot_loss", "backbone_grad_norm"):
            assert mine[key] == theirs[key]


def test_training_leaves_finite_weights_and_every_documented_file(undisturbed: Path) -> None:
    left = {str(path.relative_to(undisturbed)) for path in undisturbed.rglob("*")}
    assert {
        "config.yaml",
        "training_metrics.json",
        "logs/log.txt",
        "teacher_checkpoint.pth",
        "eval/training_9/teacher_checkpoint.pth",
        f"eval/training_{N_ITERATIONS - 1}/teacher_checkpoint.pth",
        f"ckpt/{N_ITERATIONS - 1}/.metadata",
    } <= left
    assert all(value.isfinite().all() for value in teacher(undisturbed).values())
    assert [row["iteration"] for row in losses(undisturbed)] == [0, 10, N_ITERATIONS - 1]


def test_two_trainings_with_the_same_seeds_are_equal_and_with_another_data_seed_are_not(
    arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    (tmp_path / "same").mkdir()  # as left by a run that was killed before its first checkpoint
    (tmp_path / "same" / "training_metrics.json").write_text('{"iteration": 0, "total_loss": 1.0}\n')
    main(with_output(arguments, tmp_path / "same"))
    assert_same_training(tmp_path / "same", undisturbed)
    main(with_output(arguments, tmp_path / "other", "train.seed=1"))
    assert losses(tmp_path / "other")[0]["total_loss"] != losses(undisturbed)[0]["total_loss"]


def test_loader_workers_do_not_change_the_numbers(arguments: list[str], undisturbed: Path, tmp_path: Path) -> None:
    main(with_output(arguments, tmp_path, "train.num_workers=2"))
    assert_same_training(tmp_path, undisturbed)


def test_a_training_killed_between_checkpoints_goes_on_bit_for_bit(
    arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.helpers.tiny_training", *with_output(arguments, tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (tmp_path / "ckpt" / "3" / ".metadata").exists():
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < deadline, "no checkpoint after five minutes"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "teacher_checkpoint.pth").exists() or len(losses(tmp_path)) < 3
    main(with_output(arguments, tmp_path))
    assert_same_training(tmp_path, undisturbed)


def test_what_the_configuration_says_now_counts_after_a_stop(arguments: list[str], tmp_path: Path) -> None:
    main(with_output(arguments, tmp_path / "one", "optim.epochs=1"))
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    for name, decay in (("one", 0.9), ("other", 0.3)):
        changed = (f"optim.layerwise_decay={decay}", "optim.multi_tensor_optim=false")
        main(with_output(arguments, tmp_path / name, "optim.epochs=2", *changed))
    one, other = teacher(tmp_path / "one"), teacher(tmp_path / "other")
    assert not torch.equal(one["backbone.blocks.0.mlp.fc1.weight"], other["backbone.blocks.0.mlp.fc1.weight"])


def test_a_gradient_that_is_not_finite_is_noticed_without_clipping_too(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, calls = SSLMetaArch.backprop_loss, []

    def spoil_the_second(self: SSLMetaArch, loss: torch.Tensor) -> None:
        backward(self, loss)
        calls.append(loss)
        if len(calls) == 2:
            self.student["backbone"].cls_token.grad.fill_(torch.inf)

    monkeypatch.setattr(SSLMetaArch, "backprop_loss", spoil_the_second)
    main(with_output(arguments, tmp_path, "optim.clip_grad=0", "optim.epochs=1"))
    assert "not finite at iteration 1" in (tmp_path / "nan_logs" / "logs" / "log.txt").read_text()
    assert torch.load(tmp_path / "nan_logs" / "batch_1_rank0.pth", weights_only=True)["collated_masks"].any()
    assert all(value.isfinite().all() for value in teacher(tmp_path).values())


def test_a_finished_training_started_again_changes_nothing(
    arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    before = teacher(undisturbed)
    rows = losses(undisturbed)
    main(with_output(arguments, undisturbed))
    assert all(torch.equal(before[key], value) for key, value in teacher(undisturbed).items())
    assert losses(undisturbed) == rows


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        ("student.patch_size=8", "is one of another model.*patch_embed"),
        ("crops.local_crops_number=0", "local_crops_number"),
        ("student.drop_path_rate=x", "drop_path_rate"),
    ],
)
def test_a_refused_start_leaves_the_folder_as_it_was(
    arguments: list[str], undisturbed: Path, refused: str, reason: str
) -> None:
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file() and path.suffix != ".txt"}
    with pytest.raises(ValueError, match=reason):
        main(with_output(arguments, undisturbed, refused))
    assert before == {path: path.read_bytes() for path in before}


def test_eval_only_exports_the_newest_checkpoint(arguments: list[str], undisturbed: Path) -> None:
    exported = teacher(undisturbed)
    (undisturbed / "teacher_checkpoint.pth").unlink()
    main(["--eval-only", *with_output(arguments, undisturbed)])
    assert all(torch.equal(exported[key], value) for key, value in teacher(undisturbed).items())


def test_a_new_start_keeps_the_earlier_training_apart(arguments: list[str], undisturbed: Path, tmp_path: Path) -> None:
    main(with_output(arguments, tmp_path))
    main(["--no-resume", *with_output(arguments, tmp_path, "optim.epochs=2")])
    assert (tmp_path / "ckpt" / "9" / ".metadata").exists()
    assert not (tmp_path / "ckpt" / str(N_ITERATIONS - 1)).exists()
    assert (tmp_path / "ckpt_before_1" / str(N_ITERATIONS - 1) / ".metadata").exists()
    assert [row["iteration"] for row in losses(tmp_path)] == [0, 9]
    assert (tmp_path / "training_metrics_before_1.json").exists()
