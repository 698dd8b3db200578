"""`SSLMetaArch`: student, teachers and losses of DINOv3's self-supervised objective, for one iteration.

Shapes: G = 2 global crops, L local crops, B samples per process, D channels, P patches of a global crop, K prototypes,
M masked patches. Stacked batches are crop-major: row = crop * B + sample. What happens around an iteration (schedules,
optimizer, checkpoints) is in `dinov3.train.loop`.
"""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from dinov3 import distributed
from dinov3.configs.config import load_teacher_config
from dinov3.fsdp import init_weights
from dinov3.loss import DINOLoss, GramLoss, KoLeoLoss, KoLeoLossDistributed, iBOTPatchLoss
from dinov3.train.gram import (
    masked_and_unmasked_gram,
    resize_patch_features,
    select_tokens,
    square_or_crop_grid,
)
from dinov3.train.meta_arch import N_GLOBAL_CROPS, MetaArch, Metrics
from dinov3.train.monitors import collapse_monitors
from dinov3.train.objectives import dino_pair_scales, loss_weight_schedule, weight_at
from dinov3.train.teachers import (
    build_distillation_teacher,
    build_part,
    build_student_and_teacher,
)
from dinov3.train.warm_start import freeze_first_blocks, load_network

logger = logging.getLogger("dinov3")

Outputs = dict[str, Tensor]


class SSLMetaArch(MetaArch):
    """The DINOv3 objective: DINO + iBOT + KoLeo, with optional Gram anchoring and distillation.

    Sub-modules: `student` (backbone, dino_head, ibot_head), `teacher`, `model_ema` (the same object as `teacher`,
    except in distillation, where `teacher` is the frozen model), `gram_teacher` (backbone only, or None), and the
    losses.

    Args:
        cfg: a merged training configuration (`dinov3.configs`).

    Raises:
        ValueError: the configuration contradicts itself.

    Source: DINOv3 (arXiv 2508.10104), sections 3 and 4; DINOv2 (arXiv 2304.07193), section 4.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)

        self.dino_loss = DINOLoss(cfg.dino.head_n_prototypes)
        self.ibot_patch_loss = iBOTPatchLoss(cfg.ibot.head_n_prototypes)
        self.koleo_loss = self._build_koleo_loss(cfg.dino)
        self.gram_loss = GramLoss(
            apply_norm=cfg.gram.normalized,
            img_level=cfg.gram.img_level,
            remove_neg=cfg.gram.remove_neg,
            remove_only_teacher_neg=cfg.gram.remove_only_teacher_neg,
        )

        self.student, ema, self.embed_dim = build_student_and_teacher(cfg)
        freeze_first_blocks(self.student["backbone"], cfg.student.get("frozen_blocks", 0))
        self.teacher: nn.ModuleDict = ema
        self.model_ema: nn.ModuleDict = ema
        if cfg.distillation.enabled:
            self.teacher = build_distillation_teacher(cfg, load_teacher_config(cfg.distillation.full_cfg_path))
        if self.gram_lifecycle.has_own_teacher:
            _, other, _ = build_student_and_teacher(cfg)
            self.gram_teacher = nn.ModuleDict({"backbone": other["backbone"]})

        reweighted, gram_schedule = cfg.dino.reweight_dino_local_loss, cfg.gram.loss_weight_schedule
        self.dino_local_weights = loss_weight_schedule(cfg, cfg.dino.local_loss_weight_schedule) if reweighted else None
        self.gram_weights = loss_weight_schedule(cfg, gram_schedule) if gram_schedule else None

    @staticmethod
    def _build_koleo_loss(dino: Any) -> nn.Module:
        if dino.koleo_loss_distributed:
            return KoLeoLossDistributed(topk=dino.koleo_topk, loss_group_size=dino.koleo_distributed_loss_group_size)
        return KoLeoLoss()

    # -- weights ---------------------------------------------------------------------------------------------------

    def init_weights(self) -> None:
        """Give every network its first weights: random, or from the checkpoints that the configuration names."""
        world, subgroup = distributed.get_default_process_group(), distributed.get_process_subgroup()
        self._init_randomly(self.student, self.cfg, subgroup)
        self.dino_loss.init_weights()
        self.ibot_patch_loss.init_weights()
        self.model_ema.load_state_dict(self.student.state_dict())

        if self.gram_teacher is not None and self.gram_lifecycle.ckpt:
            load_network(self.gram_teacher, self.gram_lifecycle.ckpt, "gram.ckpt", world)
            self.gram_teacher_initialized = True
        if source := self.cfg.student.resume_from_teacher_chkpt:
            load_network(self.student, source, "student.resume_from_teacher_chkpt", subgroup)
            self.model_ema.load_state_dict(self.student.state_dict())
        if source := self.cfg.student.pretrained_weights:
            backbone = nn.ModuleDict({"backbone": self.student["backbone"]})
            load_network(backbone, source, "student.pretrained_weights", subgroup)
            self.model_ema.load_state_dict(self.student.state_dict())
        if self.cfg.distillation.enabled:
            source = self.cfg.distillation.checkpoint_path
            if source == "ignore":
                logger.warning("distillation.checkpoint_path is 'ignore': the distillation teacher has random weights")
                self._init_randomly(self.teacher, load_teacher_config(self.cfg.distillation.full_cfg_path), world)
            else:
                load_network(self.teacher, source, "distillation.checkpoint_path", world)

    @staticmethod
    def _init_randomly(network: nn.ModuleDict, cfg: Any, group: ProcessGroup | None) -> None:
        """Random weights of backbone, dino_head and ibot_head, in this order."""
        for name, part in network.items():
            init_weights(part, partial(build_part, cfg, name), group)

    # -- one iteration -----------------------------------------------------------------------------------------------

    def forward_backward(
        self, data: Mapping[str, Any], *, teacher_temp: float, iteration: int = 0, **ignored_kwargs: Any
    ) -> tuple[Tensor, Metrics]:
        """One iteration: forward of teacher and student, losses, backward (gradients are accumulated into the student).

        Args:
            data: a collated batch (`dinov3.data.collate_data_and_cast`).
            teacher_temp: temperature of the Sinkhorn-Knopp targets.
            iteration: 0-based, selects scheduled loss weights.
            ignored_kwargs: accepted and unused.

        Returns:
            The total loss (scalar) and the metrics, in the order in which they are logged.
        """
        batch = self.on_device(data)
        n_samples = batch["collated_global_crops"].shape[0] // N_GLOBAL_CROPS
        metrics: Metrics = {
            "local_batch_size": float(n_samples),
            "global_batch_size": float(batch.get("global_batch_size", n_samples)),
        }
        total, losses = self._forward_and_losses(batch, teacher_temp, iteration)
        self.backprop_loss(total)
        return total.detach(), metrics | losses

    def _forward_and_losses(
        self, batch: Mapping[str, Any], teacher_temp: float, iteration: int
    ) -> tuple[Tensor, Metrics]:
        global_crops = batch["collated_global_crops"].unflatten(0, (N_GLOBAL_CROPS, -1))  # [G, B, 3, H, W]
        local_crops = batch["collated_local_crops"].unflatten(0, (-1, global_crops.shape[1]))  # [L, B, 3, h, w]
        masks, mask_indices = batch["collated_masks"], batch["mask_indices_list"]
        all_tokens = self._reads_all_tokens(global_crops.device)
        teacher_global = self.get_teacher_output(
            global_crops,
            teacher_temp=teacher_temp,
            n_masked_patches_tensor=batch["n_masked_patches"],
            mask_indices_list=mask_indices,
            upperbound=batch.get("upperbound"),
            all_tokens=all_tokens,
        )
        monitors = collapse_monitors(teacher_global) if self.monitor else {}
        student_global, student_local = self.get_student_output(
            global_crops=global_crops,
            local_crops=local_crops,
            masks=masks,
            mask_indices_list=mask_indices,
            upperbound=batch.get("upperbound"),
            all_tokens=all_tokens,
        )
        gram_global = None
        if self.gram_lifecycle.use_loss:
            gram_global = self.get_gram_teacher_output(
                batch.get("collated_gram_teacher_crops"),
                masks=masks,
                teacher_global=teacher_global,
                student_global=student_global,
                student_global_crops_size=tuple(global_crops.shape[-2:]),
            )
        total, losses = self.compute_losses(
            teacher_global=teacher_global,
            student_global=student_global,
            student_local=student_local,
            gram_global=gram_global,
            masks=masks,
            mask_indices_list=mask_indices,
            masks_weight=batch["masks_weight"],
            iteration=iteration,
        )
        return total, losses | monitors

    def _reads_all_tokens(self, device: torch.device) -> bool:
        """Whether the last block has to compute other tokens than the losses of DINO and iBOT read.

        Compiled blocks do so anyway: they want the same shapes in every iteration. So do backbones that can't select.
        """
        cfg = self.cfg
        selects = all(
            getattr(network["backbone"], "selects_patches", False) for network in (self.student, self.teacher)
        )
        compiled = cfg.train.compile and device.type != "cpu"
        return self.gram_lifecycle.use_loss or cfg.distillation.enabled or compiled or not selects

    @torch.no_grad()
    def get_teacher_output(
        self,
        images: Tensor,
        *,
        mask_indices_list: Tensor,
        teacher_temp: float,
        n_masked_patches_tensor: Tensor,
        upperbound: int | None = None,
        all_tokens: bool = True,
    ) -> Outputs:
        """Targets: the teacher on unmasked global crops.

        Args:
            images: [G, B, 3, H, W].
            mask_indices_list: [M] int64, positions of the masked patches in the flattened [G*B, P] masks.
            teacher_temp: temperature of the targets.
            n_masked_patches_tensor: [1] int64, M of this process.
            upperbound: accepted and unused.
            all_tokens: otherwise `reg_pre_head` and `patch_pre_head` are left out, and the last block computes only
                CLS tokens and masked patches. The others are equal.

        Returns:
            `cls_pre_head` [G, B, D], `reg_pre_head` [G, B, R, D], `patch_pre_head` [G, B, P, D], `cls_after_head`
            [G, B, K], `cls_centered` [G, B, K] (rows sum to 1), `masked_patch_centered` [M, K of iBOT].
        """
        crops_and_samples = images.shape[:2]
        seen = [self._at_teacher_resolution(images.flatten(0, 1))]
        selected = {} if all_tokens else {"patch_indices": [mask_indices_list]}
        (tokens,) = self.teacher["backbone"](seen, is_training=True, **selected)
        cls, patches = tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"]  # [G*B, D]; [G*B, P, D] or [M, D]
        masked = patches.flatten(0, 1).index_select(0, mask_indices_list) if all_tokens else patches  # [M, D]
        masked_logits = self.teacher["ibot_head"](masked)
        cls_logits = self.teacher["dino_head"](cls)
        outputs: Outputs = {
            "cls_pre_head": cls.unflatten(0, crops_and_samples),
            "cls_after_head": cls_logits.unflatten(0, crops_and_samples),
            "cls_centered": self.dino_loss.sinkhorn_knopp_teacher(cls_logits, teacher_temp=teacher_temp).unflatten(
                0, crops_and_samples
            ),
            "masked_patch_centered": self.ibot_patch_loss.sinkhorn_knopp_teacher(
                masked_logits,
                teacher_temp=teacher_temp,
                n_masked_patches_tensor=n_masked_patches_tensor,
                inplace=True,
            ),
        }
        if all_tokens:
            outputs["reg_pre_head"] = tokens["x_storage_tokens"].unflatten(0, crops_and_samples)
            outputs["patch_pre_head"] = patches.unflatten(0, crops_and_samples)
        return outputs

    def _at_teacher_resolution(self, images: Tensor) -> Tensor:
        """Global crops as a frozen teacher sees them: shrunk by the resolution scale (a student of larger stride)."""
        scale = self.cfg.crops.teacher_to_student_resolution_scale
        if scale == 1 or not self.cfg.distillation.enabled:  # the EMA of the student has the student's stride
            return images
        size = [round(side / scale) for side in images.shape[-2:]]
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)

    def get_student_output(
        self,
        *,
        global_crops: Tensor,
        local_crops: Tensor,
        masks: Tensor,
        mask_indices_list: Tensor,
        upperbound: int | None = None,
        all_tokens: bool = True,
    ) -> tuple[Outputs, Outputs]:
        """The student on masked global crops and on local crops, in one pass over the backbone.

        Args:
            global_crops, local_crops: [G, B, 3, H, W] and [L, B, 3, h, w].
            masks: [G*B, P] bool; not applied in distillation, whose student sees unmasked crops.
            mask_indices_list: [M] int64.
            upperbound: accepted and unused.
            all_tokens: see `get_teacher_output`; of local crops only CLS tokens are left.

        Returns:
            (global, local) dictionaries: `cls_pre_head` [S, B, D], `reg_pre_head`, `patch_pre_head`, `cls_after_head`
            [S, B, K]; the global one also `masked_patch_pre_head` [M, D], `masked_patch_after_head` [M, K of iBOT].
        """
        n_global, n_samples = global_crops.shape[:2]
        seen_masks = None if self.cfg.distillation.enabled else masks
        selected = {} if all_tokens else {"patch_indices": [mask_indices_list, mask_indices_list[:0]]}
        tokens_global, tokens_local = self.student["backbone"](
            [global_crops.flatten(0, 1), local_crops.flatten(0, 1)],
            masks=[seen_masks, None],
            is_training=True,
            **selected,
        )
        patches = tokens_global["x_norm_patchtokens"]  # [G*B, P, D] or [M, D]
        if all_tokens and patches.shape[1] != masks.shape[1]:
            raise ValueError(
                f"masks are of {masks.shape[1]} patches, but the student makes {patches.shape[1]} of a global crop: "
                "student.patch_size * crops.teacher_to_student_resolution_scale must be its stride (ConvNeXt: 32)"
            )
        masked = patches.flatten(0, 1).index_select(0, mask_indices_list) if all_tokens else patches  # [M, D]
        masked_logits = self.student["ibot_head"](masked)
        both_cls = torch.cat([tokens_global["x_norm_clstoken"], tokens_local["x_norm_clstoken"]])  # [(G+L)*B, D]
        cls_logits = self.student["dino_head"](both_cls).split(
            [n_global * n_samples, len(both_cls) - n_global * n_samples]
        )

        def outputs(tokens: Outputs, logits: Tensor) -> Outputs:
            found = {"cls_pre_head": tokens["x_norm_clstoken"].unflatten(0, (-1, n_samples))}
            if all_tokens:
                found["reg_pre_head"] = tokens["x_storage_tokens"].unflatten(0, (-1, n_samples))
                found["patch_pre_head"] = tokens["x_norm_patchtokens"].unflatten(0, (-1, n_samples))
            return found | {"cls_after_head": logits.unflatten(0, (-1, n_samples))}

        student_global = outputs(tokens_global, cls_logits[0])
        student_global |= {"masked_patch_after_head": masked_logits, "masked_patch_pre_head": masked}
        return student_global, outputs(tokens_local, cls_logits[1])

    def get_gram_teacher_output(
        self,
        images: Tensor | None,
        *,
        masks: Tensor,
        teacher_global: Outputs,
        student_global: Outputs,
        student_global_crops_size: tuple[int, int],
    ) -> Outputs:
        """Features of student and Gram teacher, on the same patch grid.

        Args:
            images: [G*B, 3, H', W'] Gram crops, or None when the EMA teacher is the Gram teacher.
            masks: [G*B, P] bool.
            teacher_global, student_global: outputs of the two passes over the global crops.
            student_global_crops_size: (H, W) of the student's crops in pixels.

        Returns:
            `student_patches`, `target_patches` [G*B, P, D], and those that `gram.tokens_used` selects,
            `selected_student`, `selected_target`.

        Raises:
            ValueError: the Gram teacher has no weights yet, or there are no Gram crops in the batch.
        """
        student = student_global["patch_pre_head"].flatten(0, 1)
        if self.gram_lifecycle.ema_teacher:
            target = teacher_global["patch_pre_head"].flatten(0, 1)
        else:
            target = self._gram_teacher_patches(images, student.shape[1], student_global_crops_size)
        used = self.cfg.gram.tokens_used
        return {
            "student_patches": student,
            "target_patches": target,
            "selected_student": select_tokens(student, masks, used),
            "selected_target": select_tokens(target, masks, used),
        }

    @torch.no_grad()
    def _gram_teacher_patches(self, images: Tensor | None, n_patches: int, crop_size: tuple[int, int]) -> Tensor:
        gram = self.cfg.gram
        if self.gram_teacher is None or not self.gram_teacher_initialized:
            raise ValueError(
                "The Gram loss was asked for before the Gram teacher had weights. Give gram.ckpt, set "
                "gram.it_load_ema_teacher to an iteration that comes first, or resume from a checkpoint that holds one"
            )
        if images is None:
            raise ValueError("The batch holds no Gram crops; set crops.gram_teacher_crops_size")
        patches = self.gram_teacher["backbone"](images, is_training=True)["x_norm_patchtokens"]
        if patches.shape[1] == n_patches:
            return patches
        patch_size = self.cfg.student.patch_size
        grid = square_or_crop_grid(patches.shape[1], (images.shape[-2], images.shape[-1]), patch_size)
        to = square_or_crop_grid(n_patches, crop_size, patch_size)
        return resize_patch_features(
            patches, grid, to, gram.global_teacher_resize_method, gram.global_teacher_resize_antialias
        )

    def compute_losses(
        self,
        *,
        teacher_global: Outputs,
        student_global: Outputs,
        student_local: Outputs,
        gram_global: Outputs | None,
        masks: Tensor,
        mask_indices_list: Tensor,
        masks_weight: Tensor,
        iteration: int,
    ) -> tuple[Tensor, Metrics]:
        """The weighted sum of all terms, and each term by its metric name.

        Terms are computed even where their weight is 0, so that they are always logged.
        """
        cfg = self.cfg
        n_global, n_local = student_global["cls_after_head"].shape[0], student_local["cls_after_head"].shape[0]
        ignore_diagonal = cfg.dino.global_ignore_diagonal
        global_scale, local_scale = dino_pair_scales(n_global, n_local, ignore_diagonal)
        local_weight = weight_at(self.dino_local_weights, 1.0, iteration)
        targets = teacher_global["cls_centered"]

        dino_local = self.dino_loss(student_local["cls_after_head"], targets)
        dino_global = self.dino_loss(student_global["cls_after_head"], targets, ignore_diagonal=ignore_diagonal)
        koleo = torch.stack([self.koleo_loss(crop) for crop in student_global["cls_pre_head"]]).mean()
        ibot = self.ibot_patch_loss.forward_masked(
            student_global["masked_patch_after_head"],
            teacher_global["masked_patch_centered"],
            student_masks_flat=masks,
            n_masked_patches=mask_indices_list.shape[0],
            masks_weight=masks_weight,
        )
        total = cfg.dino.loss_weight * (local_scale * local_weight * dino_local + global_scale * dino_global)
        total = total + cfg.dino.koleo_loss_weight * n_global * koleo + cfg.ibot.loss_weight * ibot
        metrics: Metrics = {
            "dino_local_crops_loss": dino_local.detach(),
            "dino_local_loss_weight": local_weight,
            "dino_global_crops_loss": dino_global.detach(),
            "koleo_loss": koleo.detach(),
            "ibot_loss": ibot.detach(),
        }
        if gram_global is None:
            return total, metrics
        gram_weight, gram, gram_metrics = self._gram_terms(gram_global, masks, iteration)
        return total + gram_weight * gram, metrics | gram_metrics

    def _gram_terms(self, gram_global: Outputs, masks: Tensor, iteration: int) -> tuple[float, Tensor, Metrics]:
        weight = weight_at(self.gram_weights, self.cfg.gram.loss_weight, iteration)
        loss = self.gram_loss(
            gram_global["selected_student"], gram_global["selected_target"], img_level=self.cfg.gram.img_level
        )
        metrics: Metrics = {"gram_loss_weight": weight, "gram_loss": loss.detach()}
        if self.cfg.gram.compute_stats:
            patches = gram_global["student_patches"], gram_global["target_patches"]
            metrics |= masked_and_unmasked_gram(self.gram_loss, *patches, masks)
        return weight, loss, metrics

    # -- data and process groups -------------------------------------------------------------------------------------

    @staticmethod
    def broadcast_to_subgroups(tensor: Tensor, over_dim: int, global_batch_size: int | None = None) -> Tensor:
        """This rank's share, within its subgroup, of what all ranks hold.

        All-gathers over the world, concatenates in rank order along `over_dim`, keeps the first `global_batch_size`
        entries (None: all), splits them into as many chunks as the subgroup has ranks and returns this rank's chunk.
        Without a process group: the first `global_batch_size` entries.
        """
        gathered = torch.cat(distributed.gather_all_tensors(tensor.contiguous()), dim=over_dim)
        size = gathered.shape[over_dim] if global_batch_size is None else global_batch_size
        chunks = gathered.narrow(over_dim, 0, size).chunk(distributed.get_subgroup_size(), dim=over_dim)
        return chunks[distributed.get_subgroup_rank()].contiguous()
