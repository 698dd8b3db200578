"""The loop that trains heads: rows of metrics."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dinov3.checkpointer import CheckpointRetentionPolicy
from dinov3.eval.probe import ProbeCheckpoints, train_probe


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
