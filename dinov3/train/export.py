"""Export of the EMA teacher for evaluation."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from dinov3 import distributed
from dinov3.checkpointer import save_checkpoint
from dinov3.checkpointer.checkpointer import in_main_process
from dinov3.checkpointer.directories import link_or_copy
from dinov3.models.foreign import ForeignBackbone
from dinov3.train.meta_arch import MetaArch
from dinov3.utils.files import atomically

logger = logging.getLogger("dinov3")

TEACHER_FILE = "teacher_checkpoint.pth"
FOREIGN_FILE = "library_checkpoint.pth"
_OWN_MODEL = "backbone.model."


def do_test(cfg: Any, model: MetaArch, iteration: str, process_group: Any, do_low_freq: bool = False) -> None:
    """Write the EMA teacher to `<output>/eval/<iteration>/` and, as the newest, to `<output>/teacher_checkpoint.pth`.

    The consolidated file is `{"teacher": {"backbone.…", "dino_head.…", "ibot_head.…"}}`; with
    `train.sharded_eval_checkpoint` the folder holds a sharded checkpoint instead. A student of timm or torchvision is
    also written under the names of its library, to `library_checkpoint.pth`.

    Args:
        cfg: merged configuration.
        model: holder of `model_ema`.
        iteration: name of the export, `training_<i>`.
        process_group: the group over which the teacher is sharded; all its ranks call this.
        do_low_freq: accepted and unused.

    Raises:
        CheckpointError: in all ranks: a file could not be written (a full disk). Older exports are unchanged.
    """
    output_dir = Path(cfg.train.output_dir)
    folder = output_dir / "eval" / iteration
    teacher = consolidated_state(model.model_ema)
    if cfg.train.sharded_eval_checkpoint:
        save_checkpoint(
            folder / "sharded_teacher_checkpoint",
            iteration=iteration,
            model=model.model_ema,
            process_group=process_group,
        )
    foreign = isinstance(model.model_ema["backbone"], ForeignBackbone)
    write = partial(
        _write_files, teacher, output_dir, folder, sharded=cfg.train.sharded_eval_checkpoint, foreign=foreign
    )
    in_main_process(write, process_group, f"cannot export the teacher to {folder}")
    logger.info("Exported the teacher to %s and %s", folder, output_dir / TEACHER_FILE)


def _write_files(
    teacher: dict[str, torch.Tensor], output_dir: Path, folder: Path, *, sharded: bool, foreign: bool
) -> None:
    newest = output_dir / TEACHER_FILE
    if sharded:
        write_atomically({"teacher": teacher}, newest)
    else:
        write_atomically({"teacher": teacher}, folder / TEACHER_FILE)
        link_atomically(folder / TEACHER_FILE, newest)
    if foreign:
        own = {key.removeprefix(_OWN_MODEL): value for key, value in teacher.items() if key.startswith(_OWN_MODEL)}
        write_atomically(own, folder / FOREIGN_FILE)
        link_atomically(folder / FOREIGN_FILE, output_dir / FOREIGN_FILE)


def consolidated_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The full state dict on the CPU of the subgroup's main process, empty elsewhere.

    Collective over the sharding group; one tensor at a time, so that no device ever holds the whole model.
    """
    whole: dict[str, torch.Tensor] = {}
    state: dict[str, Any] = get_model_state_dict(module)
    for key, value in state.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if distributed.is_subgroup_main_process():
            whole[key] = full.cpu()
    return whole


def write_atomically(content: Any, path: Path) -> None:
    """`torch.save` so that readers see the old file or the whole new one."""
    with atomically(path) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def link_atomically(source: Path, path: Path) -> None:
    """Make `path` another name of `source`, replacing what was there; a copy where there are no hard links."""
    with atomically(path) as temporary:
        link_or_copy(source, temporary)
