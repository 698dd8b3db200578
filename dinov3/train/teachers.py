"""The networks of the self-supervised objective: how they are built, follow each other, and get their first weights."""

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov3.layers.dino_head import DINOHead
from dinov3.models import build_model_from_cfg

logger = logging.getLogger("dinov3")

LOSS_CENTERS = ("dino_loss.center", "ibot_patch_loss.center")
HEADS = ("dino_head", "ibot_head")
NOT_SHARDED = ("backbone.rope_embed.periods", "qkv.bias_mask")


def build_heads(cfg: Any, embed_dim: int) -> dict[str, DINOHead]:
    """The two projection heads of a configuration, `dino_head` and `ibot_head`."""
    return {f"{name}_head": _head_builder(getattr(cfg, name), embed_dim)() for name in ("dino", "ibot")}


def _head_builder(options: Any, embed_dim: int) -> partial[DINOHead]:
    return partial(
        DINOHead,
        in_dim=embed_dim,
        out_dim=options.head_n_prototypes,
        hidden_dim=options.head_hidden_dim,
        bottleneck_dim=options.head_bottleneck_dim,
        nlayers=options.head_nlayers,
    )


def build_student_and_teacher(cfg: Any) -> tuple[nn.ModuleDict, nn.ModuleDict, int]:
    """Student, teacher of the same shape (no gradients), and the embedding width D."""
    student_backbone, teacher_backbone, embed_dim = build_model_from_cfg(cfg)
    student = nn.ModuleDict({"backbone": student_backbone, **build_heads(cfg, embed_dim)})
    teacher = nn.ModuleDict({"backbone": teacher_backbone, **build_heads(cfg, embed_dim)})
    return student, teacher.requires_grad_(False), embed_dim


def build_part(cfg: Any, name: str) -> nn.Module:
    """The part `name` (backbone, dino_head, ibot_head) of a configuration's network, on the meta device."""
    with torch.device("meta"):
        backbone, embed_dim = build_model_from_cfg(cfg, only_teacher=True)
        return backbone if name == "backbone" else build_heads(cfg, embed_dim)[name]


def build_distillation_teacher(cfg: Any, teacher_cfg: Any) -> nn.ModuleDict:
    """The frozen teacher of a distillation, built from its own configuration.

    Raises:
        ValueError: the two configurations disagree on the number of prototypes or on the patch size.
    """
    compared = {
        "dino.head_n_prototypes": (cfg.dino.head_n_prototypes, teacher_cfg.dino.head_n_prototypes),
        "ibot.head_n_prototypes": (cfg.ibot.head_n_prototypes, teacher_cfg.ibot.head_n_prototypes),
        "student.patch_size": (cfg.student.patch_size, teacher_cfg.student.patch_size),
    }
    if different := {key: values for key, values in compared.items() if values[0] != values[1]}:
        listed = "; ".join(f"{key}: student {mine}, teacher {theirs}" for key, (mine, theirs) in different.items())
        raise ValueError(
            f"Student and distillation teacher must agree ({listed}); change distillation.full_cfg_path or these keys"
        )
    backbone, embed_dim = build_model_from_cfg(teacher_cfg, only_teacher=True)
    return nn.ModuleDict({"backbone": backbone, **build_heads(teacher_cfg, embed_dim)}).requires_grad_(False)


@torch.no_grad()
def follow(target: Iterable[Tensor], source: Iterable[Tensor], momentum: float) -> None:
    """Exponential moving average in place: target <- momentum * target + (1 - momentum) * source.

    A momentum of 0 copies, so that a target that still holds NaN becomes valid. Of sharded tensors each process updates
    its own shard, without the cost of DTensor dispatch (which, in torch 2.7, refuses to mix them with plain tensors).

    Raises:
        ValueError: a target and its source differ in shape, or are sharded differently.
    """
    targets, sources = list(map(_local, target)), list(map(_local, source))
    if [t.shape for t in targets] != [s.shape for s in sources]:
        raise ValueError("a teacher can only follow a network of its own shapes, sharded as it is")
    if momentum == 0:
        torch._foreach_copy_(targets, sources)
        return
    torch._foreach_mul_(targets, momentum)
    torch._foreach_add_(targets, sources, alpha=1 - momentum)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill_with_invalid_values(module: nn.Module) -> None:
    """Fill every tensor with NaN, or its largest integer: what an initialisation forgets then shows at once."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
        elif tensor.dtype is torch.bool:
            tensor.fill_(True)
        else:
            tensor.fill_(torch.iinfo(tensor.dtype).max)
