"""`MultiDistillationMetaArch`: several students, each in its own process subgroup, learn from one shared teacher.

Teacher inference is shared by the whole world: each rank runs the teacher on the samples it loaded, and the ranks then
exchange crops and teacher features so that every subgroup sees the whole global batch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov3.train.meta_arch import N_GLOBAL_CROPS, Metrics
from dinov3.train.monitors import collapse_monitors
from dinov3.train.ssl_meta_arch import Outputs, SSLMetaArch


class MultiDistillationMetaArch(SSLMetaArch):
    """Distillation of one teacher into the student of this rank's subgroup (DINOv3 paper, section 5.2).

    Sizes: Bg samples in the global batch, B_t = ceil(Bg / world) loaded per rank (teacher batch), B_s = Bg / subgroup
    size (student batch per rank). There is no Gram term and students see unmasked crops.
    """

    def forward_backward(
        self, data: Mapping[str, Any], *, teacher_temp: float, iteration: int = 0, **ignored_kwargs: Any
    ) -> tuple[Tensor, Metrics]:
        """One iteration, see `SSLMetaArch.forward_backward`; `data` must hold `global_batch_size`."""
        batch = self.on_device(data)
        global_crops = batch["collated_global_crops"].unflatten(0, (N_GLOBAL_CROPS, -1))  # [G, B_t, 3, H, W]
        local_crops = batch["collated_local_crops"].unflatten(0, (-1, global_crops.shape[1]))
        size = int(batch["global_batch_size"])
        metrics: Metrics = {"batch_size": float(global_crops.shape[1])}

        teacher_global = self.get_teacher_output(
            global_crops,
            teacher_temp=teacher_temp,
            n_masked_patches_tensor=batch["n_masked_patches"],
            mask_indices_list=batch["mask_indices_list"],
            global_batch_size=size,
        )
        student_global, student_local = self.get_student_output(
            global_crops=self.broadcast_to_subgroups(global_crops, 1, size),  # [G, B_s, 3, H, W]
            local_crops=self.broadcast_to_subgroups(local_crops, 1, size),
            masks=batch["collated_masks"],
            mask_indices_list=batch["mask_indices_list"],
        )
        total, losses = self.compute_losses(
            teacher_global=teacher_global,
            student_global=student_global,
            student_local=student_local,
            gram_global=None,
            masks=batch["collated_masks"],
            mask_indices_list=batch["mask_indices_list"],
            masks_weight=batch["masks_weight"],
            iteration=iteration,
        )
        self.backprop_loss(total)
        monitors = collapse_monitors(teacher_global) if self.monitor else {}
        return total.detach(), metrics | losses | monitors

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
        global_batch_size: int | None = None,
    ) -> Outputs:
        """Targets for this rank's B_s student samples, from the B_t samples that each rank loaded.

        Bottleneck features are exchanged rather than logits or images: they are the narrowest tensors on the way.

        Args:
            images: [G, B_t, 3, H, W], the rank's own global crops.
            mask_indices_list: [M] positions in the flattened [G * B_s, P] masks.
            teacher_temp, n_masked_patches_tensor, upperbound: as in `SSLMetaArch.get_teacher_output`.
            all_tokens: accepted and unused.
            global_batch_size: Bg; None: the number of samples that all ranks loaded.

        Returns:
            `cls_after_head`, `cls_centered` [G, B_s, K], `masked_patch_centered` [M, K of iBOT].
        """
        crops_and_samples = images.shape[:2]
        tokens = self.teacher["backbone"](self._at_teacher_resolution(images.flatten(0, 1)), is_training=True)
        dino_head, ibot_head = self.teacher["dino_head"], self.teacher["ibot_head"]
        cls = dino_head(tokens["x_norm_clstoken"], no_last_layer=True).unflatten(0, crops_and_samples)
        patches = ibot_head(tokens["x_norm_patchtokens"], no_last_layer=True).unflatten(0, crops_and_samples)
        cls = self.broadcast_to_subgroups(cls, 1, global_batch_size)  # [G, B_s, bottleneck]
        patches = self.broadcast_to_subgroups(patches, 1, global_batch_size)  # [G, B_s, P, bottleneck]
        masked = patches.flatten(0, 2).index_select(0, mask_indices_list)  # [M, bottleneck]

        cls_logits = dino_head(cls.flatten(0, 1), only_last_layer=True)
        masked_logits = ibot_head(masked, only_last_layer=True)
        centered = self.dino_loss.sinkhorn_knopp_teacher(cls_logits, teacher_temp=teacher_temp)
        return {
            "cls_after_head": cls_logits.unflatten(0, cls.shape[:2]),
            "cls_centered": centered.unflatten(0, cls.shape[:2]),
            "masked_patch_centered": self.ibot_patch_loss.sinkhorn_knopp_teacher(
                masked_logits, teacher_temp=teacher_temp, n_masked_patches_tensor=n_masked_patches_tensor
            ),
        }
