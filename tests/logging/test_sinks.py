"""Further places for metrics: what they receive, and that none of them stops a training."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinov3.logging import MetricLogger
from dinov3.logging.sinks import make_sinks


def log_some(sinks: list[Any], output: Path) -> None:
    metric_logger = MetricLogger(output_file=output, sinks=sinks)
    for i in metric_logger.log_every(range(3), print_freq=2):
        metric_logger.update(loss=float(i))


def test_tensorboard_gets_every_record_at_its_iteration(tmp_path: Path) -> None:
    log_some(make_sinks(["tensorboard"], tmp_path, {}, 0), tmp_path / "metrics.json")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0.0), (2, 1.0)]


def test_wandb_is_offline_and_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    logged: list[tuple[int, float]] = []

    def init(**kwargs: Any) -> Any:
        started.append(kwargs)
        return SimpleNamespace(log=lambda record, step: logged.append((step, record["loss"])))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for _ in range(2):
        log_some(make_sinks(["wandb"], tmp_path, {"optim.lr": 1}, 0), tmp_path / "metrics.json")
    assert started[0]["mode"] == "offline"
    assert started[0]["id"] == started[1]["id"]
    assert started[0]["config"] == {"optim.lr": 1}
    assert logged[:2] == [(0, 0.0), (2, 1.0)]


def test_mlflow_logs_into_one_run_whatever_characters_names_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[str, str, float, int]] = []

    class Client:
        def __init__(self, tracking_uri: str) -> None:
            assert tracking_uri.startswith("file://")

        def create_run(self, experiment_id: str) -> Any:
            return SimpleNamespace(info=SimpleNamespace(run_id="run1"))

        def log_metric(self, run_id: str, name: str, value: float, step: int) -> None:
            logged.append((run_id, name, value, step))

    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=Client))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (sink,) = make_sinks(["mlflow"], tmp_path, {}, 0)
    sink.write({"iteration": 5, "stats_only/masked_gram_loss": 0.5})
    assert ("run1", "stats_only.masked_gram_loss", 0.5, 5) in logged


def test_a_sink_that_fails_is_closed_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def log(record: Any, step: int) -> None:
        raise ConnectionError("server is gone")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: SimpleNamespace(log=log)))
    monkeypatch.setitem(sys.modules, "mlflow", None)  # not installed
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        log_some(make_sinks(["wandb", "mlflow"], tmp_path, {}, 0), tmp_path / "metrics.json")
    assert caplog.text.count("no longer go to wandb: ConnectionError: server is gone") == 1
    assert caplog.text.count("no longer go to mlflow") == 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 2]


def test_unknown_sinks_are_refused_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown train.sinks tensorbord; known: tensorboard, wandb, mlflow"):
        make_sinks(["tensorbord"], tmp_path, {}, 0)
