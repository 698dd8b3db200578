"""The loop that trains heads: rows of metrics, and processes that die or stall."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dinov3.checkpointer import CheckpointRetentionPolicy
from dinov3.eval import linear
from dinov3.eval.probe import ProbeCheckpoints, stall_timeout_s, train_probe
from tests.eval.toys import write_colour_folders
from tests.helpers.distributed import run_distributed
from tests.helpers.processes import find_process
from tests.helpers.source import ROOT


def _train(folder: Path, stop_at: int | None = None) -> list[int]:
    """Train 30 iterations of nothing, or until it breaks; return the iterations in the file of metrics."""
    checkpoints = ProbeCheckpoints(folder, {"model": nn.Linear(1, 1)}, CheckpointRetentionPolicy.LAST)
    done = checkpoints.resume()

    def step(iteration: int) -> dict[str, Tensor]:
        if iteration == stop_at:
            raise RuntimeError("killed")
        return {"loss": torch.tensor(float(iteration))}

    train_probe(
        step=step,
        batches=iter(range(done, 100)),
        done=done,
        max_iter=30,
        checkpoints=checkpoints,
        save_period=10,
        evaluate=lambda _: 0.0,
        eval_period=100,
        metrics_file=folder / "metrics.json",
    )
    return [json.loads(line)["iteration"] for line in (folder / "metrics.json").read_text().splitlines()]


def test_each_iteration_stands_once_in_the_metrics_of_an_interrupted_training(tmp_path: Path) -> None:
    undisturbed = _train(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        _train(tmp_path / "stopped", stop_at=18)
    assert _train(tmp_path / "stopped") == undisturbed
    assert len(set(undisturbed)) == len(undisturbed) > 2


def test_the_stall_timeout_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DINOV3_STALL_TIMEOUT", raising=False)
    assert stall_timeout_s() == 7200
    monkeypatch.setenv("DINOV3_STALL_TIMEOUT", "90")
    assert stall_timeout_s() == 90
    for text in ("soon", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("DINOV3_STALL_TIMEOUT", text)
        with pytest.raises(ValueError, match=f"DINOV3_STALL_TIMEOUT={text} is no time"):
            stall_timeout_s()


# -- A rank that dies or stalls ---------------------------------------------------------------------------------------

# The linear evaluation, at a pace that leaves time to disturb it.
SLOW = """
import sys
import time

from dinov3.eval import linear
from dinov3.eval.sweep_sgd import SweepSGD

step = SweepSGD.step


def slow_step(self, *args):
    time.sleep(0.05)
    return step(self, *args)


SweepSGD.step = slow_step
linear.main(sys.argv[1:])
"""
STALL_TIMEOUT_S = 10


def _main(argv: Sequence[str]) -> None:
    linear.main(argv)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("heads")
    train, val = (write_colour_folders(folder / name, 20, seed=i) for i, name in enumerate(("train", "val")))
    (folder / "model.yaml").write_text("student: {arch: vit_nano, patch_size: 8}\n")
    return [
        f"model.config_file={folder}/model.yaml",
        *("transform.resize_size=16", "transform.crop_size=16", "train.num_workers=0", "eval.num_workers=0"),
        *(f"train.dataset=ImageFolder:root={train}", f"train.val_dataset=ImageFolder:root={val}"),
        *("train.epochs=4", "train.epoch_length=25", "train.save_checkpoint_iterations=3", "train.batch_size=4"),
        *("train.learning_rates=[0.01,0.1]", "train.checkpoint_retention_policy=LAST"),
    ]


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_distributed(_main, 2, folder, [*arguments, f"output_dir={folder}/out"], init_group=False)
    return folder / "out"


def _torchrun(script: Path, argv: Sequence[str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *argv],
        env=environment | {"DINOV3_STALL_TIMEOUT": f"{STALL_TIMEOUT_S}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
@pytest.mark.parametrize(
    ("signum", "what"), [(signal.SIGKILL, "was killed"), (signal.SIGSTOP, "is silent: killed, suspended, or cut off")]
)
def test_a_killed_or_stalled_rank_is_named_and_the_next_run_is_right(
    signum: int, what: str, arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    script, out = tmp_path / "slow_linear.py", tmp_path / "out"
    script.write_text(SLOW)
    argv = [*arguments, f"output_dir={out}"]
    process = _torchrun(script, argv)
    deadline = time.monotonic() + 200
    while not list(out.glob("**/[0-9]*/checkpoint.pth")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.01)
    os.kill(find_process(str(script), RANK="1"), signum)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 1, output  # of torchrun, whatever happened
    named = re.search(rf"^.*rank 0 of 2 gives up: .*Reason: rank 1 {what}.*$", output, re.MULTILINE)
    assert named, output
    process = _torchrun(script, argv)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert "resumed" in output
    heads, wanted = (next(folder.glob("**/final/checkpoint.pth")) for folder in (out, undisturbed))
    states = [torch.load(file, weights_only=True)["linear_classifiers"] for file in (heads, wanted)]
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
    assert (out / linear.RESULTS_FILENAME).read_text() == (undisturbed / linear.RESULTS_FILENAME).read_text()
    assert not list(out.glob("**/heartbeats*"))
