"""`FeatureDistillation`: a student learns the features of a frozen backbone, of which only the backbone is known.

No head of the teacher is needed (released backbones have none), and the student may be any backbone, one of timm or
torchvision included. A projector maps its features to the teacher's width; it is thrown away in the end.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.configs.config import load_teacher_config
from dinov3.fsdp import init_weights
from dinov3.hub.registry import BACKBONES
from dinov3.models import build_model_from_cfg
from dinov3.models.foreign import ForeignBackbone
from dinov3.train.gram import resize_patch_features, square_or_crop_grid
from dinov3.train.meta_arch import MetaArch, Metrics
from dinov3.train.warm_start import freeze_first_blocks, load_network

logger = logging.getLogger("dinov3")


class FeatureProjector(nn.Module):
    """Class and patch tokens of the student, each normed and mapped linearly to the teacher's width."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        self.cls = nn.Linear(in_dim, out_dim)
        self.patch = nn.Linear(in_dim, out_dim)

    def init_weights(self) -> None:
        """Truncated normal weights, zero biases."""
        self.norm.reset_parameters()
        for layer in (self.cls, self.patch):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """[B, D] and [B, P, D] -> [B, D'] and [B, P, D']."""
        return self.cls(self.norm(cls)), self.patch(self.norm(patches))


class FeatureDistillation(MetaArch):
    """Distillation of features: 1 - cosine between projected student and teacher, on class tokens and on patches.

    Both networks see the same crops, global and local ones; patch features of the teacher are resized to the student's
    grid. `model_ema` follows the student and is what is evaluated and exported.

    Args:
        cfg: a merged training configuration; `distillation.checkpoint_path` names the teacher's weights, and
            `distillation.full_cfg_path` its architecture unless they are a backbone of the hub.

    Raises:
        ValueError: the teacher's architecture is not known.
    """

    allow_batchnorms = True

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        student, ema, self.embed_dim = build_model_from_cfg(cfg)
        freeze_first_blocks(student, cfg.student.get("frozen_blocks", 0))
        teacher = build_teacher(cfg.distillation)
        width = teacher.embed_dim
        self.student = nn.ModuleDict({"backbone": student, "projector": FeatureProjector(self.embed_dim, width)})
        self.model_ema = nn.ModuleDict({"backbone": ema, "projector": FeatureProjector(self.embed_dim, width)})
        self.teacher = nn.ModuleDict({"backbone": teacher})
        for frozen in (self.model_ema, self.teacher):
            frozen.requires_grad_(False)
        self.weights = {
            "cls": float(cfg.distillation.get("cls_loss_weight", 1.0)),
            "patch": float(cfg.distillation.get("patch_loss_weight", 1.0)),
        }

    def init_weights(self) -> None:
        """Random weights or those of `student.pretrained_weights` for the student, the teacher's from its file."""
        world, subgroup = distributed.get_default_process_group(), distributed.get_process_subgroup()
        for name, part in self.student.items():
            init_weights(part, partial(self._build_part, name), subgroup)
        if source := self.cfg.student.pretrained_weights:
            backbone = nn.ModuleDict({"backbone": self.student["backbone"]})
            load_network(backbone, source, "student.pretrained_weights", subgroup)
        self.model_ema.load_state_dict(self.student.state_dict())
        source = self.cfg.distillation.checkpoint_path
        if source == "ignore":
            logger.warning("distillation.checkpoint_path is 'ignore': the distillation teacher has random weights")
            init_weights(self.teacher["backbone"], partial(build_teacher, self.cfg.distillation), world)
        else:
            load_network(self.teacher, source, "distillation.checkpoint_path", world)
        for network in (self.student, self.model_ema, self.teacher):
            if isinstance(network["backbone"], ForeignBackbone):
                network["backbone"].reset_buffers()

    def _build_part(self, name: str) -> nn.Module:
        with torch.device("meta"):
            if name == "backbone":
                return build_model_from_cfg(self.cfg, only_teacher=True)[0]
            return FeatureProjector(self.embed_dim, int(self.teacher["backbone"].embed_dim))  # type: ignore[arg-type]

    @torch.no_grad()
    def update_ema(self, m: float) -> None:
        """Let the EMA follow the student; its buffers (running statistics of batch norms) are copies."""
        super().update_ema(m)
        for mine, theirs in zip(self.model_ema.buffers(), self.student.buffers(), strict=True):
            mine.copy_(theirs)

    def _groups_of(self, m: nn.Module) -> list[dict[str, Any]]:
        groups = super()._groups_of(m)
        for group in groups:
            if all(param.ndim <= 1 for param in group["params"]):  # norms whose names don't tell
                group["wd_multiplier"] = 0.0
        return groups

    def forward_backward(
        self, data: Mapping[str, Any], *, teacher_temp: float = 0.0, iteration: int = 0, **ignored_kwargs: Any
    ) -> tuple[Tensor, Metrics]:
        """One iteration: both networks on all crops, loss, backward.

        Args:
            data: a collated batch (`dinov3.data.collate_data_and_cast`); its masks are not used.
            teacher_temp, iteration, ignored_kwargs: accepted and unused.

        Returns:
            The total loss and the metrics `<kind>_crops_<cls or patch>_loss`, means of 1 - cosine.
        """
        device = next(self.student.parameters()).device
        crops = {name: data[f"collated_{name}_crops"].to(device, non_blocking=True) for name in ("global", "local")}
        with torch.no_grad():
            targets = self.teacher["backbone"](list(crops.values()), is_training=True)
        outputs = self.student["backbone"](list(crops.values()), is_training=True)
        n_images = sum(len(images) for images in crops.values())
        total = torch.zeros((), device=device)
        losses: Metrics = {}
        for (name, images), output, target in zip(crops.items(), outputs, targets, strict=True):
            found = self._losses(output, target, images.shape[-2:])
            losses |= {f"{name}_crops_{kind}_loss": loss.detach() for kind, loss in found.items()}
            total = total + len(images) / n_images * sum(self.weights[kind] * loss for kind, loss in found.items())
        self.backprop_loss(total)
        sizes: Metrics = {"local_batch_size": len(crops["global"]) / 2}
        sizes["global_batch_size"] = float(data.get("global_batch_size", sizes["local_batch_size"]))
        return total.detach(), sizes | losses

    def _losses(self, output: Mapping[str, Any], target: Mapping[str, Any], size: Sequence[int]) -> dict[str, Tensor]:
        cls, patches = self.student["projector"](output["x_norm_clstoken"], output["x_norm_patchtokens"])
        theirs, own = (
            square_or_crop_grid(
                tokens["x_norm_patchtokens"].shape[1],
                (size[0], size[1]),
                int(network["backbone"].stride),  # type: ignore[arg-type]
            )
            for tokens, network in ((target, self.teacher), (output, self.student))
        )
        wanted = resize_patch_features(target["x_norm_patchtokens"].float(), theirs, own, "bilinear", True)
        return {"cls": cosine_distance(cls, target["x_norm_clstoken"]), "patch": cosine_distance(patches, wanted)}


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean over all vectors [..., D] of 1 - cosine, in float32: 0 for equal directions, 2 for opposite ones."""
    return 1 - F.cosine_similarity(a.float(), b.float(), dim=-1).mean()


def build_teacher(distillation: Any) -> Any:
    """The frozen backbone on the meta device: of its configuration file, or of the hub if its weights are.

    Raises:
        ValueError: there is no configuration file, and `checkpoint_path` is no backbone of the hub.
    """
    if distillation.full_cfg_path:
        return build_model_from_cfg(load_teacher_config(distillation.full_cfg_path), only_teacher=True)[0]
    entry = BACKBONES.get(distillation.checkpoint_path)
    if entry is None:
        raise ValueError(
            f"the architecture of distillation.checkpoint_path={distillation.checkpoint_path} is not known: give its "
            f"configuration as distillation.full_cfg_path, or one of these names as checkpoint_path: "
            f"{', '.join(BACKBONES)}"
        )
    options: dict[str, Any] = dict(entry.options)
    if next(iter(entry.hashes), None) in entry.untied_local_norm:
        options["untie_global_and_local_cls_norm"] = True
    return entry.build(**options, device="meta")
