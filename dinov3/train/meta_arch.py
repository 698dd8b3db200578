"""What every meta architecture of training is to the loop: networks, how they are placed, grouped and averaged."""

import logging
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.data import DataAugmentationDINO
from dinov3.fsdp import ac_compile_parallelize
from dinov3.train.gram import GramLifecycle
from dinov3.train.param_groups import fuse_params_groups, get_params_groups_with_decay_fsdp
from dinov3.train.teachers import fill_with_invalid_values, follow

logger = logging.getLogger("dinov3")

N_GLOBAL_CROPS = 2

Metrics = dict[str, Tensor | float]


class MetaArch(nn.Module):
    """Student, its moving average and frozen networks; objectives derive from it.

    A derived class sets `student` (trained; has a `backbone`), `model_ema` (of the same shapes) and `teacher` (possibly
    `model_ema` itself), and perhaps `gram_teacher`, and defines `init_weights` and `forward_backward`.

    Args:
        cfg: a merged training configuration (`dinov3.configs`).
    """

    student: nn.ModuleDict
    model_ema: nn.ModuleDict
    teacher: nn.ModuleDict
    allow_batchnorms = False  # whether networks may have batch norms, which one process alone can train

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = cfg
        self.gram_lifecycle = GramLifecycle.from_config(cfg.gram)
        self.gram_teacher_initialized = self.gram_lifecycle.ema_teacher
        self.gram_teacher: nn.ModuleDict | None = None
        self.monitor = False  # whether iterations also return what shows a collapse

    def forward(self, inputs: Any) -> Any:
        """Not defined: an iteration is `forward_backward`."""
        raise NotImplementedError(
            f"{type(self).__name__} has no forward; call forward_backward(data, teacher_temp=..., iteration=...)"
        )

    def forward_backward(
        self, data: Mapping[str, Any], *, teacher_temp: float, iteration: int = 0, **ignored_kwargs: Any
    ) -> tuple[Tensor, Metrics]:
        """One iteration; gradients are accumulated into the student. Returns the total loss and the metrics."""
        raise NotImplementedError(f"{type(self).__name__}.forward_backward")

    def init_weights(self) -> None:
        """Give every network its first weights."""
        raise NotImplementedError(f"{type(self).__name__}.init_weights")

    def on_device(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its tensors on the device of the student."""
        device = next(self.student.parameters()).device
        return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in data.items()}

    def backprop_loss(self, loss: Tensor) -> None:
        """Backward pass of the total loss."""
        loss.backward()

    def prepare_for_distributed_training(self) -> None:
        """Set up activation checkpointing, compilation and sharding, and put the (still empty) model on its device.

        Student and EMA are sharded over the subgroup of the student, frozen networks over the world. Afterwards every
        tensor holds an invalid value until `init_weights` or a checkpoint fills it.
        """
        frozen: list[nn.ModuleDict] = [self.model_ema]
        groups = [distributed.get_process_subgroup()]
        for extra in (self.gram_teacher, self.teacher if self.teacher is not self.model_ema else None):
            if extra is not None:
                frozen.append(extra)
                groups.append(distributed.get_default_process_group())
        device = ac_compile_parallelize(
            self.student,
            frozen,
            self.cfg,
            trained_model_process_group=distributed.get_process_subgroup(),
            inference_only_models_process_groups=groups,
            allow_batchnorms=self.allow_batchnorms,
        )
        networks = [self.student, *frozen]
        for loss in self.children():
            if all(loss is not network for network in networks):
                loss.to_empty(device=device)
        fill_with_invalid_values(self)

    @torch.no_grad()
    def update_gram(self, m: float = 0) -> None:
        """Let the Gram teacher follow the EMA teacher: gram <- m * gram + (1 - m) * ema, if there is one."""
        if self.gram_teacher is None:
            return
        logger.info("Refreshing the Gram teacher from the EMA teacher")
        ema = self.model_ema["backbone"]
        follow(self.gram_teacher.parameters(), ema.parameters(), m)
        for mine, theirs in zip(self.gram_teacher.buffers(), ema.buffers(), strict=True):
            mine.copy_(theirs)
        self.gram_teacher_initialized = True

    def gram_load_ema_teacher(self) -> None:
        """Copy the EMA teacher's backbone into the Gram teacher."""
        self.update_gram(m=0)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode; the teachers stay in evaluation mode (no drop path, no random RoPE augmentation)."""
        super().train(mode)
        for frozen in (self.teacher, self.model_ema, self.gram_teacher):
            if frozen is not None:
                frozen.eval()
        return self

    @torch.no_grad()
    def update_ema(self, m: float) -> None:
        """Let the EMA teacher follow the student: ema <- m * ema + (1 - m) * student, parameters only."""
        follow(self.model_ema.parameters(), self.student.parameters(), m)

    def get_maybe_fused_params_for_submodel(self, m: nn.Module) -> list[dict[str, Any]]:
        """Optimizer groups of one sub-module of the student, merged where equal if `optim.multi_tensor_optim`."""
        groups = self._groups_of(m)
        if not self.cfg.optim.multi_tensor_optim:
            return groups
        fused = fuse_params_groups(groups)
        for group in fused:
            group["foreach"] = True
            group["fused"] = True
        return fused

    def _groups_of(self, m: nn.Module) -> list[dict[str, Any]]:
        optim = self.cfg.optim
        return get_params_groups_with_decay_fsdp(
            model=m,
            lr_decay_rate=optim.layerwise_decay,
            patch_embed_lr_mult=optim.patch_embed_lr_mult,
            dino_head_wd_multiplier=optim.dino_head_wd_multiplier,
            module_name=next((name for name, part in self.student.items() if part is m), ""),
        )

    def get_params_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of the whole student, part by part in its order: the backbone, then what is on top."""
        return [group for m in self.student.values() for group in self.get_maybe_fused_params_for_submodel(m)]

    def build_data_augmentation_dino(self, cfg: Any) -> DataAugmentationDINO:
        """The multi-crop augmentation that the `crops` section describes."""
        crops = cfg.crops
        # Gram crops cost a decode and a resize each: made only where a Gram teacher looks at them.
        gram_size = crops.gram_teacher_crops_size if GramLifecycle.from_config(cfg.gram).has_own_teacher else None
        return DataAugmentationDINO(
            crops.global_crops_scale,
            crops.local_crops_scale,
            crops.local_crops_number,
            global_crops_size=crops.global_crops_size,
            local_crops_size=crops.local_crops_size,
            gram_teacher_crops_size=gram_size,
            gram_teacher_no_distortions=crops.gram_teacher_no_distortions,
            local_crops_subset_of_global_crops=crops.localcrops_subset_of_globalcrops,
            patch_size=cfg.student.patch_size,
            share_color_jitter=crops.share_color_jitter,
            horizontal_flips=crops.horizontal_flips,
            mean=crops.rgb_mean,
            std=crops.rgb_std,
            augmentation=crops.get("augmentation", "tensor"),
        )
