"""`--dry-run`: build everything, run two steps on synthetic images, and tell what a training will need, read and write.

`--find-batch` adds the largest batch per process that fits into memory. Nothing is written but temporary files.
"""

import argparse
import copy
import functools
import gc
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov3 import distributed
from dinov3.checkpointer import find_latest_checkpoint
from dinov3.data.datasets.synthetic import SyntheticImages
from dinov3.data.registry import dataset_names, parse_dataset_str, register_dataset
from dinov3.logging.memory import memory_mib
from dinov3.train.loaders import build_multi_resolution_data_loader_from_cfg
from dinov3.train.loop import TrainingRun
from dinov3.train.memory import MIB, explain_out_of_memory, memory_by_part
from dinov3.train.meta_arch import MetaArch
from dinov3.utils import count_parameters
from dinov3.utils.device import default_device

logger = logging.getLogger("dinov3")

N_STEPS = 2
_MAX_BATCH = 4096
# Where memory is not the accelerator's own: the share of what is free that a training may take, and how much use has to
# grow before its slope is trusted, unless a step takes too long.
_SHARE, _TRUSTED_GROWTH_MIB = 0.9, 200.0
_PATIENCE_S = 20.0


def dry_run(cfg: Any, args: argparse.Namespace, build: Callable[[Any], MetaArch]) -> None:
    """Log the report of a training that isn't run.

    Args:
        cfg: merged configuration, with the learning rate scaled.
        args: the training script's arguments.
        build: the meta architecture of a configuration, on its device.

    Raises:
        ValueError: several processes, or a multi-distillation.
        RuntimeError: the two steps don't fit into memory; the message says what needs less.
    """
    if args.multi_distillation:
        raise ValueError("--dry-run is for one student: give a student's file as --config-file, without distillation")
    if distributed.get_world_size() > 1:
        raise ValueError("--dry-run is for one process: start it without torchrun (or with --ngpus 1)")
    logger.info("dry run: nothing is trained, nothing is written to %s", args.output_dir)
    with tempfile.TemporaryDirectory(prefix="dinov3-dry-run-") as folder:
        trial = _trial_config(cfg, folder)
        run = TrainingRun(trial, build(trial), resume=False)
        try:
            step_s, load_s = time_steps(run, N_STEPS)
        except torch.OutOfMemoryError as error:
            message = explain_out_of_memory(error, cfg, memory_by_part(run.model, run.optimizer))
            raise RuntimeError(message) from error
        sections = {
            "parameters": _parameters(run.model),
            "memory": _memory(run),
            "speed": _speed(cfg, step_s, load_s),
            "schedule": _schedule(run),
            "reads": _reads(cfg, args),
            "writes": _writes(cfg, args, run),
        }
        for title, lines in sections.items():
            logger.info("%s", "\n".join([f"{title}:", *(f"  {line}" for line in lines)]))
        if args.find_batch:
            logger.info("largest batch that fits: %s", find_batch(run))


def time_steps(run: TrainingRun, n_steps: int) -> tuple[float, float]:
    """Seconds of the last of so many steps, and of making its batch in this process."""
    batches = iter(build_multi_resolution_data_loader_from_cfg(run.cfg, run.model, 0))
    step_s = load_s = 0.0
    for iteration in range(n_steps):
        start = time.perf_counter()
        batch = next(batches)
        loaded = time.perf_counter()
        run.step(iteration, batch)
        _wait_for_device()
        load_s, step_s = loaded - start, time.perf_counter() - loaded
    return step_s, load_s


# -- The report -------------------------------------------------------------------------------------------------------


def _parameters(model: MetaArch) -> Iterator[str]:
    parts: dict[str, nn.Module] = {f"student {name}": part for name, part in model.student.items()}
    parts["EMA teacher"] = model.model_ema
    if model.gram_teacher is not None:
        parts["Gram teacher"] = model.gram_teacher
    if model.teacher is not model.model_ema:
        parts["distillation teacher"] = model.teacher
    for name, part in parts.items():
        yield f"{name}: {count_parameters(part):,}"


def _memory(run: TrainingRun) -> Iterator[str]:
    for name, mib in memory_by_part(run.model, run.optimizer).items():
        yield f"{name}: {mib:,.1f} MiB"
    used = memory_mib()
    if used is not None:
        device = default_device()
        yield f"peak of {'this process' if device.type == 'cpu' else device}: {used[1]:,.0f} MiB"


def _speed(cfg: Any, step_s: float, load_s: float) -> Iterator[str]:
    batch_size = cfg.train.batch_size_per_gpu
    yield f"{batch_size / step_s:.2f} images/s: {step_s:.3f} s for a step of {batch_size} images on {default_device()}"
    yield f"{load_s:.3f} s to decode and augment a batch in one process (train.num_workers={cfg.train.num_workers})"
    hours = cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH * step_s / 3600
    yield f"{hours:,.1f} h for all iterations at this speed, if loading keeps up"


def _schedule(run: TrainingRun) -> Iterator[str]:
    total = run.total_iterations
    rates = [run.schedules.lr[i] for i in range(total)]
    highest = max(range(total), key=rates.__getitem__)
    yield (
        f"{total} iterations of {run.global_batch_size} images in {run.cfg.optim.epochs} epochs, with 1 process: "
        "more processes make the batch larger, and the learning rate by optim.scaling_rule"
    )
    yield f"{'iteration':>10} {'lr':>10} {'wd':>8} {'momentum':>9} {'temp':>7} {'last lr':>10}"
    for i in sorted({0, highest, total // 2, total - 1}):
        lr, wd, momentum, temp, last_lr = (schedule[i] for schedule in run.schedules)
        yield f"{i:>10} {lr:>10.3g} {wd:>8.4f} {momentum:>9.5f} {temp:>7.4f} {last_lr:>10.3g}"


def _reads(cfg: Any, args: argparse.Namespace) -> Iterator[str]:
    if args.config_file:
        yield f"configuration: {args.config_file}"
    name, keys = parse_dataset_str(cfg.train.dataset_path)
    yield f"data: {cfg.train.dataset_path}"
    for key in ("root", "extra"):
        if key in keys and not Path(keys[key]).expanduser().exists():
            yield f"  MISSING: {key} of {name}: {keys[key]}"
    weights = {
        "gram.ckpt": cfg.gram.ckpt,
        "student.resume_from_teacher_chkpt": cfg.student.resume_from_teacher_chkpt,
        "student.pretrained_weights": cfg.student.pretrained_weights,
        "distillation.checkpoint_path": cfg.distillation.checkpoint_path if cfg.distillation.enabled else None,
    }
    yield from (f"weights ({key}): {path}" for key, path in weights.items() if path and path != "ignore")
    newest = None if args.no_resume else find_latest_checkpoint(Path(args.output_dir, "ckpt"))
    yield f"checkpoint: {newest or 'none, training starts from its initial weights'}"


def _writes(cfg: Any, args: argparse.Namespace, run: TrainingRun) -> Iterator[str]:
    parts = memory_by_part(run.model, run.optimizer)
    one = parts["student"] + parts["teachers"] + parts["optimizer"]
    kept = cfg.checkpointing.max_to_keep
    teacher = sum(p.numel() * p.element_size() for p in run.model.model_ema.parameters()) / MIB
    every = cfg.evaluation.eval_period_iterations
    n_exports = 1 + (run.total_iterations // every if every > 0 else 0)
    yield f"{args.output_dir}/{{config.yaml, training_metrics.json, logs/}}"
    yield (
        f"{args.output_dir}/ckpt/<iteration>/ every {cfg.checkpointing.period} iterations: {one:,.1f} MiB each, "
        + ("all are kept" if kept is None else f"the newest {kept} are kept")
    )
    yield f"{args.output_dir}/eval/training_<iteration>/ {n_exports} times: {teacher:,.1f} MiB each"
    n_checkpoints = run.total_iterations // cfg.checkpointing.period if kept is None else kept + 1
    needed = max(1, n_checkpoints) * one + (n_exports + 1) * teacher
    existing = next(
        path for path in (Path(args.output_dir).resolve(), *Path(args.output_dir).resolve().parents) if path.exists()
    )
    free = shutil.disk_usage(existing).free / MIB
    yield f"{needed:,.1f} MiB in all; {free:,.0f} MiB are free" + (" - NOT ENOUGH" if free < needed else "")


# -- The largest batch ------------------------------------------------------------------------------------------------


def find_batch(run: TrainingRun) -> str:
    """The largest `train.batch_size_per_gpu` whose step fits, in words, with what it needs.

    On an accelerator batches are tried until memory runs out. On a CPU, where that would end the process (or others),
    it is extrapolated from two sizes and the memory that is free.
    """
    granularity = run.n_parts
    if default_device().type == "cpu":
        return _extrapolate(run, granularity)
    largest = largest_that_fits(functools.partial(_fits, run), granularity, _MAX_BATCH)
    if largest == 0:
        return f"not even {granularity} image(s)"
    used = memory_mib()
    peak = "" if used is None else f", {used[1]:,.0f} MiB at the peak"
    return f"train.batch_size_per_gpu={largest}{peak}"


def largest_that_fits(fits: Callable[[int], bool], granularity: int, limit: int) -> int:
    """The largest multiple of `granularity` up to `limit` that fits, if smaller ones do too; 0 if none does.

    Args:
        fits: tries a size.
        granularity: of the sizes.
        limit: largest size to try.
    """
    good, bad = 0, limit // granularity + 1  # in units of the granularity
    guess = 1
    while bad - good > 1:
        if fits(guess * granularity):
            good = guess
        else:
            bad = guess
        doubling = bad > limit // granularity
        guess = min(2 * good, bad - 1) if doubling and good else (good + bad) // 2
    return good * granularity


def _fits(run: TrainingRun, batch_size: int) -> bool:
    run.cfg.train.batch_size_per_gpu = batch_size
    try:
        time_steps(run, 1)
    except torch.OutOfMemoryError:
        fine = False
    else:
        fine = True
    run.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    torch.get_device_module(default_device()).empty_cache()
    logger.info("a batch of %d %s", batch_size, "fits" if fine else "doesn't fit")
    return fine


def _extrapolate(run: TrainingRun, granularity: int) -> str:
    available = _available_mib()
    if available is None:
        return "unknown: this system doesn't tell how much memory is used and free"
    measured: list[tuple[int, float]] = []
    size = granularity
    while size <= _MAX_BATCH:
        run.cfg.train.batch_size_per_gpu = size
        step_s, load_s = time_steps(run, 1)
        peak = (memory_mib() or (0.0, 0.0))[1]
        measured.append((size, peak))
        logger.info("a batch of %d: %.0f MiB at the peak", *measured[-1])
        grown = peak - measured[0][1]
        if grown > _TRUSTED_GROWTH_MIB or 2 * peak > available or step_s + load_s > _PATIENCE_S:
            break
        size *= 2
    if len(measured) == 1:
        return f"unknown: {size} image(s) take so much memory or time that no more were tried"
    (first, low), (last, high) = measured[-2:]
    if high <= low:
        return f"{last} or more: memory did not grow"
    slope = (high - low) / (last - first)  # MiB per image
    largest = int(last + (_SHARE * available - high) / slope) // granularity * granularity
    return (
        f"train.batch_size_per_gpu={max(0, min(largest, _MAX_BATCH))} (extrapolated: {slope:.1f} MiB per image, "
        f"{available:,.0f} MiB of memory for this process)"
    )


def _available_mib() -> float | None:
    """What this process has and could still get, in MiB."""
    table, used = Path("/proc/meminfo"), memory_mib()
    if not table.exists() or used is None:
        return None
    fields = dict(line.split(":", 1) for line in table.read_text().splitlines())
    return float(fields["MemAvailable"].split()[0]) / 1024 + used[0]


def _wait_for_device() -> None:
    if default_device().type != "cpu":
        torch.accelerator.synchronize()


def _trial_config(cfg: Any, folder: str) -> Any:
    """The configuration with synthetic images, in this process, and nothing that is written elsewhere."""
    if SyntheticImages.__name__ not in dataset_names():
        register_dataset(SyntheticImages.__name__, SyntheticImages, keys=())
    trial = copy.deepcopy(cfg)
    trial.train.dataset_path = SyntheticImages.__name__
    trial.train.num_workers = 0
    trial.train.output_dir = folder
    trial.train.sinks = []
    trial.evaluation.online_knn = None
    return trial
