"""The self-supervised training loop: what happens around each `forward_backward`.

Everything random in an iteration is a function of (seed, iteration, rank): a run that was killed and started again
computes the same losses as one that was not, bit for bit on a CPU.
"""

import gc
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dinov3 import distributed
from dinov3.checkpointer import (
    CheckpointSaver,
    RandomState,
    find_latest_checkpoint,
    keep_checkpoint_copy,
    keep_last_n_checkpoints,
    load_checkpoint,
    register_dont_save_hooks,
)
from dinov3.checkpointer.checkpointer import in_main_process
from dinov3.checkpointer.dcp import CheckpointError
from dinov3.checkpointer.directories import clean_up_after_the_killed, set_aside_damaged
from dinov3.configs.config import flat_config
from dinov3.data.collate import split_batch
from dinov3.distributed.stopping import StopRequest
from dinov3.distributed.watchdog import Watchdog
from dinov3.fsdp import synchronize_gradients
from dinov3.logging import MetricLogger, SmoothedValue
from dinov3.logging.rows import drop_rows_from
from dinov3.logging.sinks import make_sinks
from dinov3.optim import epochs_to_iterations
from dinov3.train.export import do_test, write_atomically
from dinov3.train.loaders import build_multi_resolution_data_loader_from_cfg, compute_dtype
from dinov3.train.memory import explain_out_of_memory, memory_by_part
from dinov3.train.meta_arch import MetaArch, Metrics
from dinov3.train.monitors import OnlineKnn
from dinov3.train.optimizer import apply_optim_scheduler, build_optimizer, clip_gradients, gradient_norm, hold_still
from dinov3.train.resume import RecordedConfig, check_same_student
from dinov3.train.schedules import build_schedulers
from dinov3.utils.reproducibility import derived_seed

logger = logging.getLogger("dinov3")
nan_logger = logging.getLogger("nan_logger")

T = TypeVar("T")

LOG_PERIOD = 10
GARBAGE_COLLECTION_PERIOD = 150
STALL_TIMEOUT_S = 1800.0
MAX_NON_FINITE_IN_A_ROW = 2
MAX_FAILED_SAVES_IN_A_ROW = 2


class NonFinitePolicy:
    """Count iterations in a row whose loss or gradient is not finite on some rank; too many end the training.

    Args:
        patience: iterations in a row that are skipped; one more is an error. None: never an error.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.in_a_row = 0

    def skips(self, iteration: int, checked: Tensor, metrics: Mapping[str, Any]) -> bool:
        """Whether to skip the optimizer step, so that weights and moments stay valid.

        Collective over the process subgroup: all ranks decide alike, by a scalar of this rank's that is finite if its
        loss and gradients are.

        Raises:
            RuntimeError: the patience is exhausted.
        """
        scalars = distributed.gather_all_tensors(checked, group=distributed.get_process_subgroup())
        finite = torch.stack(scalars).isfinite().flatten().tolist()  # the one number that each iteration waits for
        if all(finite):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        ranks = [rank for rank, fine in enumerate(finite) if not fine]
        values = {name: float(value) for name, value in metrics.items()}
        where = f"iteration {iteration} on ranks {ranks} ({self.in_a_row} in a row)"
        message = f"Loss or gradient is not finite at {where}: {values}"
        logger.warning("%s; the step is skipped", message)
        nan_logger.warning(message)
        if self.patience is not None and self.in_a_row > self.patience:
            raise RuntimeError(
                f"{message}. The newest checkpoint holds weights from before; resume from it with a lower "
                "learning rate or gradient clipping, or look for broken images"
            )
        return True


def seed_iteration(seed: int, iteration: int) -> None:
    """Make this iteration's random draws (drop path, RoPE augmentation) a function of seed, iteration and rank."""
    torch.manual_seed(derived_seed("iteration", seed, iteration, distributed.get_rank()))


class TrainingRun:
    """One training: model, optimizer, schedules and the iteration that comes next.

    Args:
        cfg: merged configuration.
        model: a `MetaArch` on its device.
        resume: continue from the newest checkpoint in the output folder, if there is one.
    """

    def __init__(self, cfg: Any, model: MetaArch, resume: bool) -> None:
        self.cfg, self.model = cfg, model
        self.output_dir = Path(cfg.train.output_dir)
        self.ckpt_dir = self.output_dir / "ckpt"
        self.group = distributed.get_process_subgroup()
        model.train()
        self.optimizer = build_optimizer(cfg, model.get_params_groups())
        self.schedules = build_schedulers(cfg)
        self.total_iterations = cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH
        self.global_batch_size = global_batch_size(cfg)
        knn = cfg.evaluation.get("online_knn")
        self.online_knn = OnlineKnn(knn, cfg.train.num_workers) if knn else None
        self.heads_only_iterations = epochs_to_iterations(
            cfg.optim.get("freeze_backbone_epochs", 0), cfg.train.OFFICIAL_EPOCH_LENGTH
        )
        self.n_parts = cfg.train.get("gradient_accumulation", 1)
        self.random_state = RandomState()
        self.recorded_config = RecordedConfig(flat_config(cfg))
        self.metric_logger = MetricLogger(delimiter="  ", output_file=str(self.output_dir / "training_metrics.json"))
        multi_distillation = bool(cfg.multidistillation.enabled)
        self.non_finite = NonFinitePolicy(None if multi_distillation else MAX_NON_FINITE_IN_A_ROW)
        if multi_distillation:  # the frozen teacher is as large as all students together, and can be had elsewhere
            register_dont_save_hooks(model, [key for key in model.state_dict() if key.startswith("teacher.")])
        self.saver = CheckpointSaver(
            self.group,
            in_background=cfg.checkpointing.get("in_background", True),
            patience=MAX_FAILED_SAVES_IN_A_ROW,
        )
        model.init_weights()
        if not resume:
            set_aside(self.output_dir)
        self.start_iteration = self._resume() if resume else 0
        if distributed.is_subgroup_main_process():
            names = cfg.train.get("sinks", ())
            self.metric_logger.sinks += make_sinks(
                names, self.output_dir, self.recorded_config.flat, self.start_iteration
            )
        self.n_gram_updates = model.gram_lifecycle.updates_before(self.start_iteration)

    def _resume(self) -> int:
        latest = in_main_process(self._tidy_checkpoints, self.group, f"cannot look for checkpoints in {self.ckpt_dir}")
        if latest is None:
            logger.info("No checkpoint in %s: training starts from its initial weights", self.ckpt_dir)
            drop_rows_from(self.output_dir / "training_metrics.json", 0)
            return 0
        logger.info("Resuming from %s", latest)
        check_same_student(latest, self.model.student)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        iteration = load_checkpoint(
            latest,
            model=self.model,
            optimizer=self.optimizer,
            strict_loading=False,
            process_group=self.group,
            **self._extra_state(),
        )
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # what the configuration says now
        start = iteration + 1
        if self.model.gram_lifecycle.initialized_before(start):
            self.model.gram_teacher_initialized = True
        drop_rows_from(self.output_dir / "training_metrics.json", start)
        return start

    def _tidy_checkpoints(self) -> Path | None:
        """The newest that can be loaded, after what a process that was killed left undone."""
        if self.ckpt_dir.is_dir():
            clean_up_after_the_killed(self.ckpt_dir)
        latest = find_latest_checkpoint(self.ckpt_dir)
        set_aside_damaged(self.ckpt_dir, latest)
        if latest is not None and self._is_kept_for_good(int(latest.name)):
            keep_checkpoint_copy(latest)
        return latest

    def _extra_state(self) -> dict[str, Any]:
        return {
            "random_state": self.random_state,
            "metric_logger": self.metric_logger,
            "config": self.recorded_config,
        }

    def batches(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """(iteration, batch) pairs from the start iteration to the end, with log lines on the way."""
        loader = build_multi_resolution_data_loader_from_cfg(self.cfg, self.model, self.start_iteration)
        logged = self.metric_logger.log_every(
            say_if_a_worker_died(loader),
            print_freq=LOG_PERIOD,
            header="Training",
            n_iterations=self.total_iterations,
            start_iteration=self.start_iteration,
        )
        yield from enumerate(logged, start=self.start_iteration)

    def step(self, iteration: int, batch: Mapping[str, Any]) -> Metrics:
        """One optimization step; returns the metrics to log."""
        lr, wd, momentum, teacher_temp, last_layer_lr = (schedule[iteration] for schedule in self.schedules)
        apply_optim_scheduler(self.optimizer, lr, wd, last_layer_lr)
        if iteration < self.heads_only_iterations:
            hold_still(self.optimizer, self.model.student["backbone"].parameters())
        self.optimizer.zero_grad(set_to_none=True)
        batch = {**batch, "global_batch_size": self.global_batch_size}
        self.model.monitor = iteration % LOG_PERIOD == 0 or iteration + 1 == self.total_iterations
        total_loss, metrics = self._accumulate(iteration, batch, teacher_temp)
        norms = clip_gradients(self.model.student, self.cfg.optim.clip_grad)
        metrics |= norms
        checked = total_loss + (sum(norms.values()) if norms else gradient_norm(self.model.student))
        if self.non_finite.skips(iteration, checked, metrics):
            self.keep_for_replay(iteration, batch)
        else:
            self.optimizer.step()
            self.model.update_ema(momentum)
        if self.model.gram_lifecycle.refreshes_after(iteration, self.n_gram_updates):
            self.model.update_gram()
            self.n_gram_updates += 1
        scheduled = {"lr": lr, "wd": wd, "mom": momentum, "last_layer_lr": last_layer_lr}
        return scheduled | {"total_loss": total_loss} | metrics

    def keep_for_replay(self, iteration: int, batch: Mapping[str, Any]) -> None:
        """Save the batch of the first of a series of non-finite iterations: `torch.load` it to look at it."""
        if self.non_finite.in_a_row > 1:
            return
        path = self.output_dir / "nan_logs" / f"batch_{iteration}_rank{distributed.get_rank()}.pth"
        try:
            write_atomically(dict(batch), path)
        except (OSError, RuntimeError) as error:
            logger.warning("The batch of iteration %d could not be saved: %s", iteration, error)
        else:
            logger.warning("The batch of iteration %d is in %s", iteration, path)

    def _accumulate(self, iteration: int, batch: Mapping[str, Any], teacher_temp: float) -> tuple[Tensor, Metrics]:
        """Gradients, total loss and metrics as means over the parts in which the batch is computed.

        Targets (Sinkhorn) and KoLeo's neighbours are those within a part, as if each part were a batch of its own.
        """
        parts = split_batch(batch, self.n_parts)
        results = []
        for i, part in enumerate(parts):
            synchronize_gradients(self.model.student, enabled=i == len(parts) - 1)
            results.append(self.model.forward_backward(part, teacher_temp=teacher_temp, iteration=iteration))
        if len(parts) == 1:
            return results[0]
        gradients = [param.grad for param in self.model.student.parameters() if param.grad is not None]
        torch._foreach_div_(gradients, len(parts))
        return mean_over_parts(results)

    def log(self, metrics: Metrics) -> None:
        """Hand the metrics, averaged over the process subgroup, to the meters (no wait for the device)."""
        self.metric_logger.update(**average_over_ranks(metrics))

    def all_iterations(self, stall_timeout_s: float) -> None:
        """Run from the start iteration to the end, or until a signal asks to stop."""
        # All processes watch each other, those of other students too, whose folders lie beside this one.
        folder = self.output_dir.parent if self.cfg.multidistillation.enabled else self.output_dir
        watchdog = Watchdog(folder / "heartbeats", stall_timeout_s, alone=True)
        with StopRequest() as stop, watchdog, self.saver:
            for iteration, batch in self.batches():
                watchdog.beat(f"computing iteration {iteration}")
                if stop.agreed():
                    self.ensure_saved(iteration - 1)
                    stop.leave()
                if (iteration + 1) % GARBAGE_COLLECTION_PERIOD == 0:
                    gc.collect()
                seed_iteration(self.cfg.train.seed, iteration)
                if self.model.gram_lifecycle.loads_ema_before(iteration):
                    self.model.gram_load_ema_teacher()
                self.log(self.step(iteration, batch))
                still_alive = partial(watchdog.beat, f"evaluating and saving after iteration {iteration}")
                still_alive()
                self.after_iteration(iteration, still_alive)
                watchdog.beat(f"loading the batch of iteration {iteration + 1}")

    def after_iteration(self, iteration: int, still_alive: Callable[[], None]) -> None:
        """Evaluate, record, export and checkpoint where it is due; the latter also after the last iteration."""
        if self.online_knn is not None and self.online_knn.is_due(iteration):
            if "knn_top1" not in self.metric_logger.meters:  # the newest value, not the median of a rare one
                self.metric_logger.add_meter("knn_top1", SmoothedValue(window_size=1))
            self.metric_logger.update(knn_top1=self.evaluate_online_knn(still_alive))
        self.metric_logger.record_now()  # before the checkpoint, after which this iteration isn't done again
        done, period = iteration + 1, self.cfg.evaluation.eval_period_iterations
        if done == self.total_iterations:
            self.save(iteration)
            self.export(iteration)
            self.ensure_saved(iteration)
            return
        if period > 0 and done % period == 0:
            try:
                self.export(iteration)
            except CheckpointError as error:
                logger.error("%s; the training goes on", error)
        if done % self.cfg.checkpointing.period == 0:
            self.save(iteration)

    def evaluate_online_knn(self, on_batch: Callable[[], None]) -> float:
        """Top-1 accuracy of the EMA teacher in percent."""
        assert self.online_knn is not None
        self.saver.wait()  # its loader starts processes, which should not copy this one while a thread is at work
        accuracy = self.online_knn.evaluate(self.model.model_ema["backbone"], compute_dtype(self.cfg), on_batch)
        logger.info("Online k-NN of the EMA teacher: %.2f %%", accuracy)
        return accuracy

    def export(self, iteration: int) -> None:
        """Write the EMA teacher after an iteration for evaluations."""
        do_test(self.cfg, self.model, f"training_{iteration}", self.group)

    def save(self, iteration: int) -> None:
        """Begin to write `ckpt/<iteration>`; then old ones are dropped, and a copy is kept if `keep_every` says so."""
        self.metric_logger.flush()
        self.saver.save(
            self.ckpt_dir / str(iteration),
            iteration=iteration,
            model=self.model,
            optimizer=self.optimizer,
            then=self._retain,
            **self._extra_state(),
        )

    def ensure_saved(self, iteration: int) -> None:
        """Return when the state after an iteration, the newest one, is on disk.

        Raises:
            CheckpointError: it could not be saved.
        """
        path = self.ckpt_dir / str(iteration)
        self.saver.wait()
        if iteration < self.start_iteration or self.saver.newest == path:
            return
        self.save(iteration)
        self.saver.wait()
        if self.saver.newest != path:
            raise CheckpointError(
                f"the state after iteration {iteration} could not be saved (the reason stands above). When there is "
                f"space, start the same command again: it goes on from the newest checkpoint in {self.ckpt_dir}"
            )

    def _retain(self, path: Path) -> None:
        if self._is_kept_for_good(int(path.name)):
            keep_checkpoint_copy(path)
        keep_last_n_checkpoints(self.ckpt_dir, self.cfg.checkpointing.max_to_keep)

    def _is_kept_for_good(self, iteration: int) -> bool:
        return (iteration + 1) % int(self.cfg.checkpointing.keep_every) == 0


def do_train(
    cfg: Any, model: MetaArch, resume: bool = False, *, stall_timeout_s: float = STALL_TIMEOUT_S
) -> dict[str, float]:
    """Train to the end; returns the average of every metric over the iterations of this call.

    A signal (Ctrl-C, SIGTERM, the one that announces a preemption) ends the training after a checkpoint.

    Args:
        cfg: merged configuration.
        model: a `MetaArch` on its device.
        resume: continue from the newest checkpoint in the output folder, if there is one.
        stall_timeout_s: without progress for this long, name the process that is the reason, and end.

    Raises:
        Stopped: on such a signal; an exit with a code that tells which (`dinov3.distributed.stopping`).
        PeerLost: another process died or stalled; also an exit.
        CheckpointError: the last state or the last export could not be written, or too many checkpoints in a row.
        RuntimeError: the loss was not finite for too many iterations in a row, or memory ran out: then the message says
            what holds it and which settings need less.
    """
    run = TrainingRun(cfg, model, resume)
    if run.start_iteration >= run.total_iterations:
        logger.info("Nothing to do: all %d iterations are done", run.total_iterations)
        do_test(cfg, model, f"training_{run.start_iteration - 1}", run.group)
        return {}
    gc.disable()  # a collection in one process makes all others wait: collect together, at known iterations
    gc.collect()
    try:
        run.all_iterations(stall_timeout_s)
    except torch.OutOfMemoryError as error:
        parts = memory_by_part(model, run.optimizer)
        raise RuntimeError(explain_out_of_memory(error, cfg, parts)) from error
    finally:
        gc.enable()
    run.metric_logger.synchronize_between_processes()
    return {name: meter.global_avg for name, meter in run.metric_logger.meters.items()}


def say_if_a_worker_died(loader: Iterable[T]) -> Iterator[T]:
    """The batches of a loader. If a worker dies while it hands one over, torch only speaks of a connection."""
    try:
        yield from loader
    except (ConnectionError, EOFError) as error:
        raise RuntimeError(
            "a worker of the data loader died (killed, or out of memory) as it handed over a batch"
        ) from error


def global_batch_size(cfg: Any) -> int:
    """Images per iteration over all processes."""
    if cfg.multidistillation.enabled:
        return int(cfg.multidistillation.global_batch_size)
    return int(cfg.train.batch_size_per_gpu) * distributed.get_world_size()


def mean_over_parts(results: Sequence[tuple[Tensor, Metrics]]) -> tuple[Tensor, Metrics]:
    """Mean of total losses and of metrics; `local_batch_size` adds up."""
    metrics: Metrics = {}
    for name in results[0][1]:
        total = sum(part[name] for _, part in results)
        metrics[name] = total if name == "local_batch_size" else total / len(results)
    return torch.stack([loss for loss, _ in results]).mean(), metrics


def average_over_ranks(metrics: Metrics) -> Metrics:
    """Mean of every metric over the process subgroup, in one collective; unchanged for one process."""
    group = distributed.get_process_subgroup()
    if distributed.get_world_size(group) == 1:
        return metrics
    device = next(value.device for value in metrics.values() if isinstance(value, Tensor))
    stacked = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in metrics.values()])
    torch.distributed.all_reduce(stacked, op=torch.distributed.ReduceOp.SUM, group=group)
    return dict(zip(metrics, stacked / distributed.get_world_size(group), strict=True))


def set_aside(output_dir: Path) -> None:
    """Rename checkpoints and metrics of an earlier training in this folder, so that they don't mix with a new one's."""
    if distributed.is_subgroup_main_process() and (output_dir / "ckpt").exists():
        number = next(i for i in itertools.count(1) if not (output_dir / f"ckpt_before_{i}").exists())
        for old in (output_dir / "ckpt", output_dir / "training_metrics.json"):
            if old.exists():
                old.rename(old.with_stem(f"{old.stem}_before_{number}"))
        logger.info("The earlier training's checkpoints are now in %s", output_dir / f"ckpt_before_{number}")
    if distributed.is_enabled() and distributed.get_subgroup_size() > 1:
        torch.distributed.barrier(distributed.get_process_subgroup())
