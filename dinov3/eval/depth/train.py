"""Training of a depth head on a frozen backbone. The loop is `eval/probe.py`; here is what a step and a score are."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dinov3 import distributed
from dinov3.checkpointer import CheckpointRetentionPolicy
from dinov3.checkpointer.heads import HEAD_FILE, HeadFile, save_head
from dinov3.eval.data import short_name
from dinov3.eval.depth.config import DepthConfig
from dinov3.eval.depth.data import make_train_dataset, make_train_loader
from dinov3.eval.depth.datasets.datasets_utils import make_valid_mask, parse_eval_crop
from dinov3.eval.depth.eval import evaluate_dataset
from dinov3.eval.depth.loss import MultiLoss, SigLoss
from dinov3.eval.depth.metrics import check_metrics
from dinov3.eval.depth.models.depther import TASK, Depther, plain_decoder_config
from dinov3.eval.depth.models.linear_head import resize
from dinov3.eval.flat_checkpoints import FlatCheckpoints
from dinov3.eval.probe import average_gradients, broadcast_parameters, train_probe
from dinov3.logging.rows import add_row, drop_rows_from
from dinov3.optim.lr_schedulers import build_scheduler, fast_forward

logger = logging.getLogger("dinov3")

VALIDATION_FILE = "validation.jsonl"


class IterBasedTrainer:
    """One step of the training of a depther's decoder, the same on all processes.

    Args:
        depther: its decoder is trained; everything else is frozen.
        optimizer: of the decoder's parameters.
        scheduler: steps after each optimizer step.
        loss: `loss(pred, target, valid_mask)`.
        eval_mask: part of the image that the loss sees, see `make_valid_mask`.
        ignored_value: marks pixels without a true depth.
        gradient_clip: largest norm of the gradient of all parameters together.
    """

    def __init__(
        self,
        depther: Depther,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        loss: nn.Module,
        *,
        eval_mask: str = "FULL",
        ignored_value: float = 0.0,
        gradient_clip: float = 35.0,
    ) -> None:
        self.depther, self.optimizer, self.scheduler, self.loss = depther, optimizer, scheduler, loss
        self.eval_mask = parse_eval_crop(eval_mask)
        self.ignored_value, self.gradient_clip = ignored_value, gradient_clip
        self.parameters = [p for p in depther.decoder.parameters() if p.requires_grad]
        self.device = self.parameters[0].device

    def train_on_batch(self, images: Tensor, depths: Tensor) -> dict[str, Tensor]:
        """One optimizer step. A collective of the world.

        Args:
            images: normalised, `[B, 3, h, w]`.
            depths: `[B, 1, H, W]` in metres.

        Returns:
            `loss` of this process's batch, `grad_norm` before clipping, `lr` of this step; scalars.
        """
        images, depths = (x.to(self.device, non_blocking=True) for x in (images, depths))
        self.depther.train()  # the encoder's backbone stays in evaluation mode
        mask = make_valid_mask(depths, self.eval_mask, self.ignored_value)
        depths = torch.where(mask, depths, self.ignored_value)
        loss = self.loss(resize(self.depther(images), depths.shape[-2:]), depths, mask)
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(self.parameters)
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.gradient_clip)
        lr = torch.tensor(float(self.optimizer.param_groups[0]["lr"]))
        self.optimizer.step()
        self.scheduler.step()
        return {"loss": loss.detach(), "grad_norm": grad_norm, "lr": lr}

    def step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """`train_on_batch` of what the loader gives."""
        return self.train_on_batch(*batch)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, by key."""
        return {
            "model": self.depther.decoder,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loss": self.loss,
        }

    def fast_forward(self, iterations: int) -> None:
        """Bring schedule and loss to where they are after so many iterations, for files that don't hold them."""
        fast_forward(self.scheduler, iterations)
        for module in self.loss.modules():
            if isinstance(module, SigLoss):
                module.n_calls = iterations


def build_trainer(depther: Depther, config: DepthConfig) -> IterBasedTrainer:
    """The trainer that the configuration describes; all processes start from the weights of rank 0.

    Raises:
        ValueError: no losses, or unknown names.
    """
    loss = MultiLoss(cast(Mapping[Any, float], config.losses or {}))
    options = config.optimizer
    broadcast_parameters(depther.decoder.state_dict().values())
    optimizer = AdamW(
        [p for p in depther.decoder.parameters() if p.requires_grad],
        lr=float(options.lr),
        betas=(options.beta1, options.beta2),
        weight_decay=options.weight_decay,
    )
    scheduler = build_scheduler(
        config.scheduler.type,
        optimizer,
        float(options.lr),
        config.scheduler.total_iter,
        config.scheduler.constructor_kwargs,
    )
    return IterBasedTrainer(
        depther,
        optimizer,
        scheduler,
        loss,
        eval_mask=config.transforms.train.eval_mask if config.transforms.train else "FULL",
        ignored_value=config.eval.ignored_value,
        gradient_clip=options.gradient_clip,
    )


def train_depther(
    depther: Depther,
    config: DepthConfig,
    *,
    backbone: str | dict[str, Any],
    train_dataset: Any = None,
) -> Depther:
    """Train the decoder, validating and saving on the way. A collective of the world.

    Interrupted, it goes on from the newest checkpoint in the output folder to the same weights: the order of the
    samples and their random changes are functions of (seed, rank, iteration).

    Args:
        depther: on its device.
        config: how to train, and where files go.
        backbone: what the head file says of the backbone, see `HeadFile`.
        train_dataset: of (image, depth); default: that of the configuration.

    Returns:
        The depther with the weights of the last iteration, in evaluation mode.

    Raises:
        ValueError: the configuration has no training set, transforms or losses, or names that don't exist.
    """
    check_metrics(tuple(config.metrics))
    dataset = make_train_dataset(config) if train_dataset is None else train_dataset
    trainer = build_trainer(depther, config)
    output_dir = Path(config.output_dir or ".")
    checkpoints = FlatCheckpoints(
        output_dir,
        trainer.state(),
        CheckpointRetentionPolicy.ALL,
        fast_forward=trainer.fast_forward,
        optional=("scheduler", "loss"),  # which files of the published code lack
    )
    done = checkpoints.resume()
    validation = _Validation(depther, config, output_dir / VALIDATION_FILE, done)
    total = config.scheduler.total_iter
    train_probe(
        step=trainer.step,
        batches=make_train_loader(dataset, config, done=done) if done < total else (),
        done=done,
        max_iter=total,
        checkpoints=checkpoints,
        save_period=config.eval.eval_interval,
        evaluate=validation,
        eval_period=config.eval.eval_interval,
    )
    depther.eval()
    write_head(output_dir / HEAD_FILE, depther, config, backbone)
    return depther


class _Validation:
    """Measures on `datasets.val`, without test-time augmentation; logs it and adds a line to a file."""

    def __init__(self, depther: Depther, config: DepthConfig, path: Path, done: int) -> None:
        self.depther, self.config, self.path = depther, config, path
        drop_rows_from(path, done + 1)

    def __call__(self, iteration: int) -> float:
        """After `iteration` + 1 iterations, or finally with `iteration` = their number; returns a1 in percent."""
        if not self.config.datasets.val:
            return 0.0
        means = evaluate_dataset(self.depther, self.config, self.config.datasets.val, tta=False)
        done = min(iteration + 1, self.config.scheduler.total_iter)
        shown = ", ".join(f"{name} {means[name]:.4f}" for name in self.config.metrics)
        logger.info("validation after %d iterations on %s: %s", done, short_name(self.config.datasets.val), shown)
        add_row(self.path, done, means)
        return 100.0 * means["a1"]


def write_head(path: Path, depther: Depther, config: DepthConfig, backbone: str | dict[str, Any]) -> None:
    """Write what `dinov3.hub.load_head` makes a model of (main process only)."""
    if not distributed.is_main_process():
        return
    mean, std = ((values[0], values[1], values[2]) for values in (config.transforms.mean, config.transforms.std))
    head_file = HeadFile(
        task=TASK,
        head=depther.decoder.state_dict(),
        config=plain_decoder_config(config.decoder_head),
        backbone=backbone,
        mean=mean,
        std=std,
    )
    save_head(path, head_file)


def parameters_of(modules: Iterable[nn.Module]) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)
