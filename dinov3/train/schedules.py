"""The schedules of a training, from its configuration (the maths is in `dinov3.optim.schedules`)."""

import logging
from typing import Any

from dinov3 import distributed
from dinov3.optim.schedules import (
    TrainingSchedules,
    cosine_training_schedules,
    epochs_to_iterations,
    frozen_at_start,
    lr_scale,
    warmup_cosine_from_epochs,
)

logger = logging.getLogger("dinov3")


def build_schedulers(cfg: Any) -> TrainingSchedules:
    """(lr, weight decay, momentum, teacher temperature, last-layer lr), each indexed by the 0-based iteration.

    With a section `schedules` see `build_schedulers_v2`. Otherwise the keys of `optim` and `teacher` count; `optim.lr`
    is taken as it is: `apply_scaling_rules_to_cfg` scales it beforehand.
    """
    if "schedules" in cfg:
        return build_schedulers_v2(cfg)
    optim, teacher = cfg.optim, cfg.teacher
    return cosine_training_schedules(
        epochs=optim.epochs,
        epoch_length=cfg.train.OFFICIAL_EPOCH_LENGTH,
        lr=optim.lr,
        min_lr=optim.min_lr,
        warmup_epochs=optim.warmup_epochs,
        freeze_last_layer_epochs=optim.freeze_last_layer_epochs,
        weight_decay=optim.weight_decay,
        weight_decay_end=optim.weight_decay_end,
        momentum_teacher=teacher.momentum_teacher,
        final_momentum_teacher=teacher.final_momentum_teacher,
        warmup_teacher_temp=teacher.warmup_teacher_temp,
        teacher_temp=teacher.teacher_temp,
        warmup_teacher_temp_epochs=teacher.warmup_teacher_temp_epochs,
        schedule_trunc_extra=optim.schedule_trunc_extra,
    )


def build_schedulers_v2(cfg: Any) -> TrainingSchedules:
    """Schedules from the section `schedules`; peak and end of the learning rate are scaled by `optim.scaling_rule`."""
    epoch_length = cfg.train.OFFICIAL_EPOCH_LENGTH

    def build(name: str, scale: float = 1.0) -> Any:
        node = cfg.schedules[name]
        return warmup_cosine_from_epochs(
            start=node.start,
            peak=node.peak * scale,
            end=node.end * scale,
            warmup_epochs=node.warmup_epochs,
            cosine_epochs=node.get("cosine_epochs"),
            epochs=cfg.optim.epochs,
            epoch_length=epoch_length,
        )

    batch_size = cfg.train.batch_size_per_gpu * distributed.get_world_size()
    scale = lr_scale(cfg.optim.scaling_rule, batch_size)
    lr = build("lr", scale)
    logger.info(
        "Learning rate: peak %g x %g (%s, %d images per iteration), end %g x %g; highest %g",
        cfg.schedules.lr.peak,
        scale,
        cfg.optim.scaling_rule,
        batch_size,
        cfg.schedules.lr.end,
        scale,
        max(lr),
    )
    frozen = epochs_to_iterations(cfg.schedules.lr.freeze_last_layer_epochs, epoch_length)
    return TrainingSchedules(
        lr=lr,
        weight_decay=build("weight_decay"),
        momentum=build("momentum"),
        teacher_temp=build("teacher_temp"),
        last_layer_lr=frozen_at_start(lr, frozen),
    )
