"""Training of segmentation heads on a frozen backbone: the linear head, and Mask2Former with its adapter.

The loop is `eval/probe.py`. A step's batch and everything random in it are functions of (seed, iteration, process), so
an interrupted training goes on to the same head.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dinov3 import distributed
from dinov3.checkpointer import CheckpointRetentionPolicy
from dinov3.checkpointer.heads import HEAD_FILE, read_head
from dinov3.eval.probe import ProbeCheckpoints, average_gradients, broadcast_parameters, train_probe
from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.data import (
    InfiniteDataloader,
    class_names,
    make_eval_dataset,
    make_eval_loader,
    make_train_dataset,
    make_train_loader,
    worker_init_fn,
)
from dinov3.eval.segmentation.eval import evaluate_segmentation_model, measure_areas, summarize_areas, write_report
from dinov3.eval.segmentation.inference import HeadType
from dinov3.eval.segmentation.loss import MultiSegmentationLoss
from dinov3.eval.segmentation.mask2former_loss import Mask2FormerLoss
from dinov3.eval.segmentation.models import FeatureDecoder, head_state, load_head_state
from dinov3.eval.segmentation.schedulers import build_scheduler
from dinov3.eval.segmentation.views import ViewAverager
from dinov3.eval.segmentation.weights import HeadState, compute_dtype, make_decoder, save_segmentation_head
from dinov3.eval.setup import autocast_context
from dinov3.utils.device import default_device
from dinov3.utils.files import atomically
from dinov3.utils.reproducibility import derived_seed

__all__ = ["InfiniteDataloader", "train_segmentation", "train_step", "validate", "worker_init_fn"]

logger = logging.getLogger("dinov3")

FINAL_MODEL = "model_final.pth"
_CHECKPOINTS = "checkpoints"


def train_segmentation(backbone: nn.Module, config: SegmentationConfig) -> dict[str, float]:
    """Train a head, and evaluate it on the way. A collective of the world.

    Writes into `output_dir`: `head.pth`, the head of the best evaluation by `metric_to_save`; `model_final.pth`, the
    last one with its optimizer; `results-per-class.csv` and `pictures/` of the best; `checkpoints/`.

    Args:
        backbone: frozen from now on.
        config: what to train, on what.

    Returns:
        The metrics of the best evaluation, see `evaluate_segmentation_model`.

    Raises:
        ValueError: settings that contradict each other, or labels beyond the classes.
    """
    training = _Training(backbone, config)
    training.run()
    return training.finish()


class _Training:
    """The parts of one training, and what the loop calls."""

    def __init__(self, backbone: nn.Module, config: SegmentationConfig) -> None:
        self.config = config
        self.device = default_device()
        self.folder = Path(config.output_dir or ".")
        self.max_iter = config.scheduler.total_iter
        self.train_dataset = make_train_dataset(config)
        self.val_dataset = make_eval_dataset(config, img_size=config.transforms.eval.img_size, use_tta=False)
        self.names = class_names(self.val_dataset, config.decoder_head.num_classes)
        torch.manual_seed(config.seed)
        self.decoder = make_decoder(backbone, config).to(self.device)
        self.parameters = [parameter for parameter in self.decoder.parameters() if parameter.requires_grad]
        broadcast_parameters(self.parameters)
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.decoder, config.decoder_head.type, optimizer.weight_decay),
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
        )
        scheduler = config.scheduler
        self.scheduler = build_scheduler(
            scheduler.type, self.optimizer, optimizer.lr, scheduler.total_iter, scheduler.constructor_kwargs
        )
        self.criterion = make_criterion(config).to(self.device)
        self.scores_of = ViewAverager.from_config(self.decoder, config, self.device)
        self.best = BestEvaluation()
        self.checkpoints = ProbeCheckpoints(
            self.folder / _CHECKPOINTS,
            {
                "head": HeadState(self.decoder),
                "optimizer": self.optimizer,
                "scheduler": self.scheduler,
                "best": self.best,
            },
            CheckpointRetentionPolicy.LAST,
        )

    def run(self) -> None:
        """Train to the end, from the newest checkpoint on."""
        config = self.config
        self.iteration = self.checkpoints.resume() if config.train.resume else 0
        set_train_mode(self.decoder)
        train_probe(
            step=self.step,
            batches=make_train_loader(
                self.train_dataset,
                batch_size=config.bs,
                num_workers=config.num_workers,
                seed=config.seed,
                start_iteration=self.iteration,
            ),
            done=self.iteration,
            max_iter=self.max_iter,
            checkpoints=self.checkpoints,
            save_period=config.train.checkpoint_interval or config.eval.eval_interval,
            evaluate=self.evaluate,
            eval_period=config.eval.eval_interval,
        )

    def step(self, batch: Any) -> dict[str, Tensor]:
        torch.manual_seed(derived_seed("step", self.config.seed, self.iteration, distributed.get_rank()))
        losses = compute_losses(self.decoder, batch, self.device, self.criterion, compute_dtype(self.config))
        update(
            sum_of(losses),
            self.parameters,
            self.optimizer,
            self.scheduler,
            gradient_clip=self.config.optimizer.gradient_clip,
            global_step=self.iteration,
        )
        self.iteration += 1
        found = {name: loss.detach() for name, loss in losses.items()}
        return {"loss": sum_of(found), **found}

    def evaluate(self, iteration: int) -> float:
        """Measure the head; keep it if it is the best."""
        loader = make_eval_loader(self.val_dataset, num_workers=self.config.num_workers)
        areas = measure_areas(self.scores_of, loader, reduce_zero_label=self.config.eval.reduce_zero_label)
        set_train_mode(self.decoder)
        metrics = summarize_areas(areas, per_image=self.config.eval.compute_metric_per_image)
        logger.info("after %d iterations: %s", self.iteration, metrics)
        if self.best.offer(metrics, areas, self.config.metric_to_save) and distributed.is_main_process():
            save_segmentation_head(self.folder, head_state(self.decoder), self.config, self.names)
        return metrics[self.config.metric_to_save]

    def finish(self) -> dict[str, float]:
        """Write the files of the end."""
        if distributed.is_main_process():
            final = {key: value.cpu() for key, value in head_state(self.decoder).items()}
            with atomically(self.folder / FINAL_MODEL) as file:
                torch.save({"model": final, "optimizer": self.optimizer.state_dict()}, file)
            load_head_state(self.decoder, read_head(self.folder / HEAD_FILE).head)
            self.decoder.eval()
            assert self.best.areas is not None
            write_report(self.scores_of, self.best.areas, self.val_dataset, self.config)
        return self.best.metrics


class BestEvaluation:
    """The best evaluation so far, as a part of checkpoints.

    Attributes:
        metrics: in percent; empty before the first.
        areas: behind them, [n, 4, K].
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.areas: Tensor | None = None

    def offer(self, metrics: Mapping[str, float], areas: Tensor, metric_to_save: str) -> bool:
        """Keep an evaluation that is better than the best, or the first; return whether it was kept.

        Raises:
            ValueError: there is no such metric.
        """
        if metric_to_save not in metrics:
            raise ValueError(f"metric_to_save is one of {', '.join(metrics)}, got {metric_to_save!r}")
        best = self.metrics.get(metric_to_save, math.nan)
        if self.metrics and not (math.isnan(best) or metrics[metric_to_save] > best):
            return False
        self.metrics, self.areas = dict(metrics), areas
        return True

    def state_dict(self) -> dict[str, Any]:
        """Plain values and a tensor."""
        return {"metrics": self.metrics, "areas": self.areas}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take them back."""
        self.metrics, self.areas = dict(state_dict["metrics"]), state_dict["areas"]


def make_criterion(config: SegmentationConfig) -> nn.Module:
    """The loss of the configured head.

    Raises:
        ValueError: an unknown head, or losses that make no sense.
    """
    if config.decoder_head.type == "linear":
        return MultiSegmentationLoss(config.train.diceloss_weight, config.train.celoss_weight)
    if config.decoder_head.type == "m2f":
        return Mask2FormerLoss(config.decoder_head.num_classes, **vars(config.train.m2f))
    raise ValueError(f"decoder_head.type is 'linear' or 'm2f', got {config.decoder_head.type!r}")


def parameter_groups(decoder: nn.Module, head_type: str, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: all of a linear head in one; norms and embeddings of Mask2Former without weight decay."""
    trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    if head_type == "linear":
        return [{"params": trained, "weight_decay": weight_decay}]
    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.Embedding)
    spared = {id(p) for module in decoder.modules() if isinstance(module, norms) for p in module.parameters()}
    spared |= {id(p) for name, p in decoder.named_parameters() if name.endswith(("level_embed", "level_encoding"))}
    return [
        {"params": [p for p in trained if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in spared], "weight_decay": 0.0},
    ]


def set_train_mode(decoder: FeatureDecoder) -> None:
    """Training mode for all but the frozen backbone."""
    decoder.train()
    features = cast(Any, decoder.segmentation_model[0])
    if hasattr(features, "backbone"):  # of an adapter, which is trained with the head
        features.backbone.eval()


def train_step(
    segmentation_model: nn.Module,
    batch: Any,
    device: torch.device | str,
    scaler: Any,
    optimizer: Optimizer,
    optimizer_gradient_clip: float,
    scheduler: LRScheduler,
    criterion: nn.Module,
    model_dtype: torch.dtype | None,
    global_step: int,
) -> Tensor:
    """One step of training. A collective of the world.

    Args:
        segmentation_model: in training mode, its backbone in evaluation mode.
        batch: (images [B, 3, h, w], (index, labels [B, 1, h, w])).
        device: of the model.
        scaler: a `torch.amp.GradScaler` for float16; None: none.
        optimizer: of the head's parameters.
        optimizer_gradient_clip: largest norm of the gradient of all of them; `inf`: no bound.
        scheduler: makes a step, except in step 0: step k runs with the rate number max(k - 1, 0).
        criterion: of (prediction, labels [B, h, w]); a loss, or several by name.
        model_dtype: for autocast; None or float32: none.
        global_step: number of the step, from 0.

    Returns:
        The loss, a number without graph.
    """
    loss = sum_of(compute_losses(segmentation_model, batch, torch.device(device), criterion, model_dtype))
    update(
        loss,
        [parameter for parameter in segmentation_model.parameters() if parameter.requires_grad],
        optimizer,
        scheduler,
        gradient_clip=optimizer_gradient_clip,
        global_step=global_step,
        scaler=scaler,
    )
    return loss.detach()


def compute_losses(
    segmentation_model: nn.Module,
    batch: Any,
    device: torch.device,
    criterion: nn.Module,
    model_dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The losses of a batch by name; see `train_step`."""
    images, (_, labels) = batch
    images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    labels = labels.squeeze(1).long()
    with autocast_context(device, model_dtype or torch.float32):
        pred = segmentation_model(images)
        if isinstance(pred, Tensor) and pred.shape[-2:] != labels.shape[-2:]:
            pred = F.interpolate(pred, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        losses = criterion(pred, labels)
    return {"loss": losses} if isinstance(losses, Tensor) else losses


def sum_of(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of the losses."""
    return torch.stack(list(losses.values())).sum()


def update(
    loss: Tensor,
    parameters: Sequence[nn.Parameter],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    gradient_clip: float,
    global_step: int,
    scaler: Any = None,
) -> None:
    """Backward, the mean over processes, clipping, and the steps of optimizer and scheduler; see `train_step`."""
    optimizer.zero_grad(set_to_none=True)
    (loss if scaler is None else scaler.scale(loss)).backward()
    average_gradients(parameters)
    if scaler is not None:
        scaler.unscale_(optimizer)
    if gradient_clip != float("inf"):
        nn.utils.clip_grad_norm_(parameters, gradient_clip)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    if global_step > 0:
        scheduler.step()


def validate(
    segmentation_model: FeatureDecoder,
    val_dataloader: Iterable[Any],
    device: torch.device | str,
    autocast_dtype: torch.dtype,
    eval_res: int | None,
    eval_stride: int | None,
    decoder_head_type: HeadType,
    num_classes: int,
    global_step: int,
    metric_to_save: str,
    current_best_metric_to_save_value: float,
) -> tuple[bool, dict[str, float]]:
    """Evaluate during a training, and put the head back into training mode; see `evaluate_segmentation_model`.

    Returns:
        Whether `metric_to_save` is better than the best so far, and the metrics.
    """
    metrics = evaluate_segmentation_model(
        segmentation_model,
        val_dataloader,
        device,
        eval_res,
        eval_stride,
        decoder_head_type,
        num_classes,
        autocast_dtype,
    )
    set_train_mode(segmentation_model)
    logger.info("after step %d: %s", global_step, metrics)
    return metrics[metric_to_save] > current_best_metric_to_save_value, metrics
