"""The one loop that trains heads on frozen features: by iterations, with evaluations, checkpoints and exact resume.

What a step is, and what is measured, belongs to the task (linear classification and others).
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3 import distributed
from dinov3.checkpointer import (
    CheckpointRetentionPolicy,
    cleanup_checkpoint,
    find_all_checkpoints,
    keep_last_n_checkpoints,
)
from dinov3.checkpointer.files import read_file
from dinov3.distributed.stopping import StopRequest
from dinov3.distributed.watchdog import Watchdog
from dinov3.logging import MetricLogger
from dinov3.logging.rows import drop_rows_from
from dinov3.utils.files import atomically

logger = logging.getLogger("dinov3")

_FILE, _FINAL, _BEST = "checkpoint.pth", "final", "best"
_STALL_TIMEOUT_S = 2 * 3600.0


def stall_timeout_s() -> float:
    """Longest time without progress, in seconds: `DINOV3_STALL_TIMEOUT`, else two hours.

    An evaluation of a large validation set counts as one piece.

    Raises:
        ValueError: the variable is no positive number.
    """
    text = os.environ.get("DINOV3_STALL_TIMEOUT") or f"{_STALL_TIMEOUT_S}"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"DINOV3_STALL_TIMEOUT={text} is no time: give a positive number of seconds")
    return seconds


def collective_timeout() -> timedelta:
    """Of collectives in evaluations: long enough for the watchdog to find the reason first."""
    return timedelta(seconds=2 * stall_timeout_s())


class Stateful(Protocol):
    """What a checkpoint holds."""

    def state_dict(self) -> Any:
        """Tensors and plain data."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take them back."""


def read_parts(path: Path) -> dict[str, Any]:
    """The content of a file of a training's checkpoint: its parts by name.

    Raises:
        ValueError: the file is damaged, or something else; the message names it.
    """
    content = read_file(path, mapped=False)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} is no checkpoint: it holds {type(content).__name__}, expected parts by name")
    return content


class ProbeCheckpoints:
    """Checkpoints `<folder>/<name>/checkpoint.pth`; names are iterations, `final` and `best`.

    Files are written by the main process of the subgroup, to a temporary name first.

    Args:
        folder: made when needed.
        state: what is saved, by key.
        policy: what remains in the end.
        fast_forward: called with the number of iterations done when a file lacks a key of `optional`.
        optional: keys that files of earlier versions lack.

    Attributes:
        best_accuracy: in percent; -1 before the first evaluation.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        state: Mapping[str, Stateful],
        policy: CheckpointRetentionPolicy,
        *,
        fast_forward: Callable[[int], None] | None = None,
        optional: tuple[str, ...] = (),
    ) -> None:
        self.folder, self.state, self.policy = Path(folder), state, policy
        self.fast_forward, self.optional = fast_forward, optional
        self.best_accuracy = -1.0

    def resume(self, source: str | os.PathLike[str] | None = None) -> int:
        """Load the newest checkpoint, a finished one first; return the number of iterations that are done.

        Args:
            source: folder of checkpoints to start from, unless the own folder has got further: a job that starts again
                goes on.
        """
        folders = [self.folder] if source is None else [self.folder, Path(source)]
        found = [path for path in map(_newest_checkpoint, folders) if path is not None]
        newest = max(found, key=_iterations_by_name, default=None)
        if newest is None:
            if source is not None:
                raise FileNotFoundError(f"{source} holds no checkpoint (<iteration>/{_FILE} or {_FINAL}/{_FILE})")
            return 0
        saved = read_parts(newest)
        needed = ("iteration", "best_accuracy", *self.state)
        missing = [key for key in needed if key not in saved and key not in self.optional]
        if missing:
            raise ValueError(f"{newest} lacks {', '.join(missing)}; it has {', '.join(saved)}")
        done = int(saved["iteration"]) + 1
        self.load(saved, done)
        self.best_accuracy = float(saved["best_accuracy"])
        logger.info("resumed %s: %d iterations are done", newest, done)
        return done

    def load(self, saved: Mapping[str, Any], done: int) -> None:
        """Give every part its saved state; parts of `optional` that aren't there are wound forward instead."""
        if self.fast_forward is not None and any(key not in saved for key in self.optional):
            self.fast_forward(done)  # before the others are loaded: it may change them
        for key, part in self.state.items():
            if key in saved:
                part.load_state_dict(saved[key])

    def save(self, name: str, iteration: int) -> None:
        """Write one checkpoint; `iteration` is the 0-based index of the last finished one."""
        if not distributed.is_subgroup_main_process():
            return
        path = self.folder / name / _FILE
        states = {key: part.state_dict() for key, part in self.state.items()}
        with atomically(path) as file:
            torch.save({"iteration": iteration, "best_accuracy": self.best_accuracy, **states}, file)

    def save_regular(self, iteration: int) -> None:
        """Write the checkpoint of an iteration, and delete the one before unless all are kept."""
        self.save(str(iteration), iteration)
        if distributed.is_subgroup_main_process():
            keep_last_n_checkpoints(self.folder, self.policy.max_to_keep)

    def offer_best(self, accuracy: float, iteration: int) -> None:
        """Write `best` if the accuracy, in percent, is as good as the best so far."""
        if accuracy >= self.best_accuracy:
            self.best_accuracy = accuracy
            self.save(_BEST, iteration)

    def finish(self, iteration: int) -> None:
        """Write `final`."""
        self.save(_FINAL, iteration)

    def is_finished(self) -> bool:
        """Whether `final` is there."""
        return (self.folder / _FINAL / _FILE).exists()

    def clean_up(self) -> None:
        """Delete what the policy doesn't keep."""
        if distributed.is_subgroup_main_process():
            cleanup_checkpoint(self.folder, self.policy)


def _newest_checkpoint(folder: Path) -> Path | None:
    candidates = [folder / _FINAL / _FILE, *(path / _FILE for path in reversed(find_all_checkpoints(folder)))]
    return next((path for path in candidates if path.exists()), None)


def _iterations_by_name(checkpoint: Path) -> float:
    name = checkpoint.parent.name
    return float("inf") if name == _FINAL else int(name)


def train_probe(
    *,
    step: Callable[[Any], Mapping[str, Tensor]],
    batches: Iterable[Any],
    done: int,
    max_iter: int,
    checkpoints: ProbeCheckpoints,
    save_period: int,
    evaluate: Callable[[int], float],
    eval_period: int,
    metrics_file: Path | None = None,
) -> None:
    """Train to iteration `max_iter`, evaluating and saving on the way; then evaluate once more and clean up.

    An evaluation comes before the checkpoint of the same iteration, which so knows the best accuracy. A signal (Ctrl-C,
    SIGTERM, the one that announces a preemption) ends the training after a checkpoint; a process that dies or stalls is
    named, and ends the others.

    Args:
        step: trains on one batch; returns what is logged.
        batches: endless, starting after the iterations that are done.
        done: iterations that are done.
        max_iter: number of all iterations.
        checkpoints: where states are saved.
        save_period: iterations between checkpoints.
        evaluate: `evaluate(n)` measures after n + 1 iterations, or finally with n = `max_iter`; returns percent.
        eval_period: iterations between evaluations. The last iteration is evaluated in the end in any case.
        metrics_file: JSON lines that log lines are appended to, in numbers, each iteration once.

    Raises:
        Stopped: on such a signal; an exit with a code that tells which (`dinov3.distributed.stopping`).
        PeerLost: another process died or stalled; also an exit.
    """
    if metrics_file is not None:
        drop_rows_from(metrics_file, done)
    metric_logger = MetricLogger(delimiter="  ", output_file=metrics_file)
    iterations = metric_logger.log_every(batches, 10, "Training", n_iterations=max_iter, start_iteration=done)
    timeout_s = stall_timeout_s()
    with StopRequest() as stop, Watchdog(checkpoints.folder / "heartbeats", timeout_s) as watchdog:
        for iteration, batch in enumerate(iterations, start=done):
            watchdog.beat(f"computing iteration {iteration}")
            if stop.agreed():
                if iteration > done:
                    checkpoints.save_regular(iteration - 1)
                stop.leave()
            metric_logger.update(**step(batch))
            last = iteration + 1 == max_iter
            watchdog.beat(f"evaluating and saving after iteration {iteration}")
            if (iteration + 1) % eval_period == 0 and not last:
                checkpoints.offer_best(evaluate(iteration), iteration)
            if (iteration + 1) % save_period == 0 and not last:
                checkpoints.save_regular(iteration)
            watchdog.beat(f"loading the batch of iteration {iteration + 1}")
        # With several processes the first answer is older than a signal that came during the last iteration.
        if stop.agreed() or stop.agreed():
            checkpoints.save_regular(max_iter - 1)
            stop.leave()
    # From here on a signal ends the process at once: there is nothing to save between two iterations.
    with Watchdog(checkpoints.folder / "heartbeats_in_the_end", timeout_s) as watchdog:
        watchdog.beat("evaluating in the end")
        accuracy = evaluate(max_iter)
        if done < max_iter or not checkpoints.is_finished():
            checkpoints.offer_best(accuracy, max_iter - 1)
            checkpoints.finish(max_iter - 1)
    if distributed.get_world_size() > 1:
        dist.barrier()  # nobody writes into the folder any more
    checkpoints.clean_up()


def broadcast_parameters(parameters: Iterable[Tensor]) -> None:
    """Give all processes the values of rank 0."""
    if distributed.get_world_size() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average gradients over all processes, in one collective."""
    world_size = distributed.get_world_size()
    if world_size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
