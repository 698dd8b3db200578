"""Self-supervised training: the script, its arguments, and the steps from a configuration to a trained teacher.

    python dinov3/train/train.py --config-file CONFIG.yaml --output-dir OUT [key=value ...]

The same runs under torchrun and through `python -m dinov3.run.submit`. The loop itself is in `dinov3.train.loop`.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dinov3 import distributed
from dinov3.checkpointer import find_latest_checkpoint, load_checkpoint
from dinov3.configs import (
    apply_scaling_rules_to_cfg,
    exit_job,
    get_cfg_from_args,
    setup_config,
    setup_multidistillation,
)
from dinov3.configs.check import check_config
from dinov3.configs.config import student_configs
from dinov3.data.registry import check_dataset_str
from dinov3.logging import setup_logging
from dinov3.run.init import job_context
from dinov3.train.dry_run import dry_run
from dinov3.train.export import do_test
from dinov3.train.feature_distillation import FeatureDistillation
from dinov3.train.loaders import build_data_loader_from_cfg, build_multi_resolution_data_loader_from_cfg
from dinov3.train.loop import STALL_TIMEOUT_S, do_train
from dinov3.train.meta_arch import MetaArch
from dinov3.train.multidist_meta_arch import MultiDistillationMetaArch
from dinov3.train.optimizer import apply_optim_scheduler, build_optimizer
from dinov3.train.resume import check_same_student
from dinov3.train.schedules import build_schedulers, build_schedulers_v2
from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.utils import count_parameters

__all__ = [
    "apply_optim_scheduler",
    "build_data_loader_from_cfg",
    "build_multi_resolution_data_loader_from_cfg",
    "build_optimizer",
    "build_schedulers",
    "build_schedulers_v2",
    "do_test",
    "do_train",
    "get_args_parser",
    "main",
]

logger = logging.getLogger("dinov3")

torch.backends.cuda.matmul.allow_tf32 = True  # as in the published training
torch.backends.cudnn.benchmark = False

META_ARCHITECTURES: dict[str, type[MetaArch]] = {
    "SSLMetaArch": SSLMetaArch,
    "MultiDistillationMetaArch": MultiDistillationMetaArch,
    "FeatureDistillation": FeatureDistillation,
}
IGNORED = "accepted for compatibility, without effect"


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """The command line of the training script."""
    parser = argparse.ArgumentParser(
        "dinov3 training",
        add_help=add_help,
        allow_abbrev=False,
        description="Self-supervised training of a DINOv3 backbone.",
        epilog="Example: train.py --config-file dinov3/configs/train/vitl_im1k_lin834.yaml --output-dir runs/vitl "
        "train.dataset_path=ImageFolder:root=<images> train.batch_size_per_gpu=32",
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML file, merged over the defaults")
    parser.add_argument(
        "--no-resume", action="store_true", help="start anew although the output folder has checkpoints"
    )
    parser.add_argument(
        "--eval-only", action="store_true", help="export the teacher of the newest checkpoint, then stop"
    )
    parser.add_argument("--output-dir", default="./local_dino", help="folder for checkpoints, logs and exports")
    parser.add_argument("--seed", default=0, type=int, help="seed of weights and random states (data: train.seed)")
    parser.add_argument("--multi-distillation", action="store_true", help="several students, one per process subgroup")
    parser.add_argument(
        "--allow-unknown-keys", action="store_true", help="warn of unknown config keys instead of stopping"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run two steps on synthetic images; tell parameters, memory, speed, schedule, what is read and written",
    )
    parser.add_argument("--find-batch", action="store_true", help="a dry run that also finds the largest batch")
    parser.add_argument(
        "--stall-timeout",
        type=float,
        default=STALL_TIMEOUT_S,
        metavar="SECONDS",
        help="without progress for this long, name the process that is the reason, and end; default: %(default)g",
    )
    parser.add_argument("--eval", default="", help=IGNORED)
    parser.add_argument("--eval_pretrained_weights", default="", help=IGNORED)
    for flag in ("--benchmark-codebase", "--test-ibot", "--profiling", "--dump-fsdp-weights", "--record_ref_losses"):
        parser.add_argument(flag, action="store_true", help=IGNORED)
    parser.add_argument("--ref_losses_path", default="", help=IGNORED)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="key=value", help="overrides; they come last")
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parsed arguments; options after the overrides are refused instead of being swallowed by them."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if misplaced := [option for option in args.opts if option.startswith("-")]:
        parser.error(f"options must come before the key=value overrides; found after them: {' '.join(misplaced)}")
    if malformed := [option for option in args.opts if "=" not in option]:
        parser.error(f"overrides have the form key=value; got: {' '.join(malformed)}")
    return args


def check_arguments(argv: Sequence[str], n_processes: int) -> None:
    """Refuse a command line that can't work on so many processes: the launcher asks before it starts any.

    Takes seconds, and neither a device nor a process group: networks are built on the meta device.

    Raises:
        SystemExit: options that the parser refuses.
        ValueError: unknown keys, contradictions, an architecture or a data set that doesn't exist.
        FileNotFoundError: there is no such configuration file.
    """
    args = parse_args(argv)
    multi = args.multi_distillation
    configs = student_configs(args, n_processes) if multi else [get_cfg_from_args(args, strict=False)]
    for cfg in configs:
        check_config(cfg)
        try:
            check_dataset_str(cfg.train.dataset_path)
        except (AssertionError, KeyError, TypeError) as error:
            raise ValueError(f"train.dataset_path: {error}") from error
        try:
            _build_on_meta(cfg, multi_distillation=multi)
        except NotImplementedError as error:
            raise ValueError(f"student.arch: {error}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says (None: the process's own)."""
    args = parse_args(argv)
    # Later than the watchdog, which knows more than a collective that ran out of time.
    timeout = timedelta(seconds=2 * args.stall_timeout)
    if args.dry_run or args.find_batch:
        with job_context(seed=args.seed):
            cfg = apply_scaling_rules_to_cfg(get_cfg_from_args(args, strict=False))
            check_config(cfg)
            dry_run(cfg, args, partial(build_meta_arch, multi_distillation=False))
        return
    check = partial(_check, args=args)
    if args.multi_distillation:
        cfg = setup_multidistillation(args, distributed_timeout=timeout, check=check)
        try:
            _run(cfg, args)
        finally:
            exit_job()
        return
    with job_context(output_dir=args.output_dir, seed=args.seed, distributed_timeout=timeout):
        cfg = setup_config(args, strict_cfg=False, check=check)
        _run(cfg, args)


def _check(cfg: Any, args: argparse.Namespace) -> None:
    """Refuse contradictions, and a checkpoint in the output folder that is one of another model."""
    check_config(cfg)
    latest = find_latest_checkpoint(Path(cfg.train.output_dir, "ckpt")) if _resumes(args) else None
    if latest is not None:
        check_same_student(latest, _build_on_meta(cfg, multi_distillation=args.multi_distillation).student)


def _resumes(args: argparse.Namespace) -> bool:
    """A job that SLURM has started again goes on, whatever it was told at first."""
    return not args.no_resume or int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def _run(cfg: Any, args: argparse.Namespace) -> None:
    setup_logging(output=str(Path(args.output_dir, "nan_logs")), name="nan_logger")
    model = build_meta_arch(cfg, multi_distillation=args.multi_distillation)
    if args.eval_only:
        export_newest(cfg, model)
        return
    do_train(cfg, model, resume=_resumes(args), stall_timeout_s=args.stall_timeout)


def build_meta_arch(cfg: Any, *, multi_distillation: bool) -> MetaArch:
    """The meta architecture of the configuration, allocated on its device, its tensors not yet initialised.

    Raises:
        ValueError: `MODEL.META_ARCHITECTURE` is unknown, or doesn't fit `--multi-distillation`.
    """
    model = _build_on_meta(cfg, multi_distillation=multi_distillation)
    model.prepare_for_distributed_training()
    logger.info("%s: %d trained parameters", type(model).__name__, count_parameters(model.student))
    return model


def _build_on_meta(cfg: Any, *, multi_distillation: bool) -> MetaArch:
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in META_ARCHITECTURES:
        raise ValueError(f"MODEL.META_ARCHITECTURE is {name!r}; expected one of {', '.join(META_ARCHITECTURES)}")
    if multi_distillation and name != "MultiDistillationMetaArch":
        raise ValueError(f"--multi-distillation needs MODEL.META_ARCHITECTURE=MultiDistillationMetaArch, got {name}")
    with torch.device("meta"):
        return META_ARCHITECTURES[name](cfg)


def export_newest(cfg: Any, model: MetaArch) -> None:
    """Export the EMA teacher of the newest checkpoint.

    Raises:
        FileNotFoundError: the output folder has no checkpoint.
    """
    folder = Path(cfg.train.output_dir, "ckpt")
    latest = find_latest_checkpoint(folder)
    if latest is None:
        raise FileNotFoundError(f"--eval-only: there is no checkpoint in {folder}; train first, or change --output-dir")
    group = distributed.get_process_subgroup()
    iteration = load_checkpoint(latest, model=model, strict_loading=False, process_group=group)
    do_test(cfg, model, f"training_{iteration}", group)


if __name__ == "__main__":
    main(sys.argv[1:])
