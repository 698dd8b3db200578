"""Where records of metrics go. A record maps names to numbers, `iteration` first."""

import errno
import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dinov3.utils.files import atomically

logger = logging.getLogger("dinov3")


class Sink(Protocol):
    """Takes records; is called in the main process of the subgroup only."""

    def write(self, record: Mapping[str, float]) -> None:
        """Store one record."""


class JsonLinesSink:
    """Appends every record to a file, one JSON object per line.

    The file is opened for each record: it may be removed or rewritten in between. Lines that can't be stored (a full
    disk) wait for the next one, with a warning.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._waiting: list[str] = []

    def write(self, record: Mapping[str, float]) -> None:
        """Append one line."""
        self._waiting.append(json.dumps(record) + "\n")
        self.flush()

    def flush(self) -> None:
        """Store the lines that wait, if there are any and it is possible now."""
        if not self._waiting:
            return
        try:
            with open(self.path, "ab", buffering=0) as file:
                size = file.tell()
                content = "".join(self._waiting).encode()
                try:
                    if file.write(content) != len(content):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                except OSError:
                    file.truncate(size)  # no half of a line
                    raise
        except OSError as error:
            logger.warning("%d lines wait for a place in %s: %s", len(self._waiting), self.path, error)
        else:
            self._waiting.clear()


class TensorBoardSink:
    """Scalars in `<output>/tensorboard`; a run that continues hides the points it will make again."""

    def __init__(self, output_dir: Path, config: Mapping[str, Any], start_iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start_iteration)

    def write(self, record: Mapping[str, float]) -> None:
        """Add one point to each curve."""
        for name, value in record.items():
            if name != "iteration":
                self.writer.add_scalar(name, value, global_step=int(record["iteration"]))
        self.writer.flush()


class WandbSink:
    """A Weights & Biases run, offline unless `WANDB_MODE` says otherwise; a resumed training resumes its run."""

    def __init__(self, output_dir: Path, config: Mapping[str, Any], start_iteration: int) -> None:
        import wandb

        self.run = wandb.init(
            dir=str(output_dir),
            id=_kept_identifier(output_dir / "wandb_run_id", lambda: uuid.uuid4().hex),
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=dict(config),
        )

    def write(self, record: Mapping[str, float]) -> None:
        """Log one step."""
        self.run.log(dict(record), step=int(record["iteration"]))


class MLflowSink:
    """An MLflow run in `<output>/mlflow` unless `MLFLOW_TRACKING_URI` is set; a resumed training resumes its run."""

    def __init__(self, output_dir: Path, config: Mapping[str, Any], start_iteration: int) -> None:
        import mlflow

        uri = os.environ.get("MLFLOW_TRACKING_URI", (output_dir / "mlflow").resolve().as_uri())
        self.client = mlflow.MlflowClient(tracking_uri=uri)
        self.run_id = _kept_identifier(
            output_dir / "mlflow_run_id", lambda: str(self.client.create_run(experiment_id="0").info.run_id)
        )

    def write(self, record: Mapping[str, float]) -> None:
        """Log one value of each metric."""
        for name, value in record.items():
            self.client.log_metric(self.run_id, name.replace("/", "."), float(value), step=int(record["iteration"]))


class GuardedSink:
    """A sink that is closed, with one warning, when it fails: a training goes on without it."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self.name = name
        self._sink: Sink | None = None
        self._guard(lambda: setattr(self, "_sink", make()))

    def write(self, record: Mapping[str, float]) -> None:
        """Store one record, if the sink still works."""
        if (sink := self._sink) is not None:
            self._guard(lambda: sink.write(record))

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracking library or its server does, training is worth more
            logger.warning("metrics no longer go to %s: %s: %s", self.name, type(error).__name__, error)
            self._sink = None


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MLflowSink,
}


def make_sinks(
    names: Sequence[str], output_dir: Path, config: Mapping[str, Any], start_iteration: int
) -> list[GuardedSink]:
    """Sinks by name.

    Args:
        names: of `TRACKERS`.
        output_dir: folder of the run.
        config: flat configuration, shown by trackers that can.
        start_iteration: first iteration of which a record may come.

    Raises:
        ValueError: an unknown name.
    """
    if unknown := [name for name in names if name not in TRACKERS]:
        raise ValueError(f"unknown train.sinks {', '.join(unknown)}; known: {', '.join(TRACKERS)}")
    return [GuardedSink(n, lambda n=n: TRACKERS[n](output_dir, config, start_iteration)) for n in names]  # type: ignore[misc]


def _kept_identifier(path: Path, make: Callable[[], str]) -> str:
    """What the file holds, or else a new identifier, which it then holds."""
    if path.exists() and (kept := path.read_text().strip()):
        return kept
    identifier = make()
    with atomically(path) as file:
        file.write_text(identifier)
    return identifier
