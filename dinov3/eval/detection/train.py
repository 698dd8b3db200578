"""Training of a detector's head on a frozen backbone. The loop is `eval/probe.py`; here is what a step and a score
are.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from dinov3 import distributed
from dinov3.checkpointer import CheckpointRetentionPolicy
from dinov3.checkpointer.heads import HEAD_FILE, HeadFile, save_head
from dinov3.checkpointer.weights import read_state_dict
from dinov3.data.datasets import CocoDetection
from dinov3.data.datasets.coco_detection import Categories
from dinov3.eval.data import short_name
from dinov3.eval.detection.config import DetectionHeadConfig, config_values
from dinov3.eval.detection.data import (
    Batch,
    make_train_dataset,
    make_train_loader,
    open_dataset,
)
from dinov3.eval.detection.eval import evaluate_dataset, make_views
from dinov3.eval.detection.loss import LossWeights, SetCriterion
from dinov3.eval.detection.matcher import Costs
from dinov3.eval.detection.models.detr import PlainDETR, PostProcess
from dinov3.eval.detection.models.processor import DetectorWithProcessor, head_state, load_head_state, one_to_one
from dinov3.eval.detection.recipe import DetectionConfig
from dinov3.eval.flat_checkpoints import FlatCheckpoints
from dinov3.eval.probe import average_gradients, broadcast_parameters, train_probe
from dinov3.logging.rows import add_row, drop_rows_from
from dinov3.optim.lr_schedulers import WarmupMultiStepLR
from dinov3.utils.reproducibility import derived_seed

logger = logging.getLogger("dinov3")

VALIDATION_FILE = "validation.jsonl"
METRICS_FILE = "training_metrics.json"
# Parameters whose names hold one of these have another weight decay.
_SPARED = ("norm", "bias", "cpb_mlp", "level_embed", "reference_points")


class HeadState:
    """A detector's tensors but those of its frozen backbone, as a part of checkpoints."""

    def __init__(self, detector: nn.Module) -> None:
        self.detector = detector

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return head_state(self.detector)

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take them back, strictly."""
        load_head_state(self.detector, state_dict)


def parameter_groups(model: nn.Module, weight_decay: float, wd_norm_mult: float) -> list[dict[str, Any]]:
    """Groups for AdamW: most of the trained parameters, and those with `wd_norm_mult` times the weight decay."""
    groups: list[list[nn.Parameter]] = [[], []]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[any(part in name for part in _SPARED)].append(parameter)
    decays = (weight_decay, weight_decay * wd_norm_mult)
    return [{"params": group, "weight_decay": decay} for group, decay in zip(groups, decays, strict=True) if group]


def make_criterion(config: DetectionConfig, head: DetectionHeadConfig) -> SetCriterion:
    """The losses of a configuration.

    Raises:
        ValueError: unknown parts of the matching cost, or an unknown class loss.
    """
    bbox = 1.0 if head.reparam else 5.0
    known = {"class": 2.0, "bbox": None, "giou": 2.0}
    if unknown := set(config.matcher) - set(known):
        raise ValueError(f"unknown parts of matcher: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    cost = {key: bbox if value is None else float(value) for key, value in (known | config.matcher).items()}
    losses = config.losses
    weights = LossWeights(losses.ce, bbox if losses.bbox is None else losses.bbox, losses.giou, losses.cls_loss)
    costs = Costs(cost["class"], cost["bbox"], cost["giou"])
    return SetCriterion(costs, weights, head.k_one2many, head.lambda_one2many)


class DetectionTrainer:
    """One step of the training of a detector's head, the same on all processes.

    Args:
        detector: on its device. All processes start from the weights of rank 0.
        config: how to train.
        total: number of all iterations.
        epoch: number of iterations of an epoch.
    """

    def __init__(self, detector: PlainDETR, config: DetectionConfig, total: int, epoch: int) -> None:
        self.detector, self.config = detector, config
        self.criterion = make_criterion(config, detector.config)
        self.parameters = [p for p in detector.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        broadcast_parameters(head_state(detector).values())
        options, schedule = config.optimizer, config.scheduler
        groups = parameter_groups(detector, options.weight_decay, options.wd_norm_mult)
        self.optimizer = AdamW(groups, lr=options.lr)
        self.scheduler = WarmupMultiStepLR(
            self.optimizer,
            total_steps=total,
            # Half a step behind the end of an epoch: its last step still has the rate of the epoch.
            milestones=[(milestone * epoch + 0.5) / total for milestone in schedule.milestones],
            gamma=schedule.gamma,
            warmup_iters=schedule.warmup_iters,
        )
        self.iteration = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, by key."""
        return {"model": HeadState(self.detector), "optimizer": self.optimizer, "scheduler": self.scheduler}

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimizer step. A collective of the world.

        Returns:
            `loss` (weighted sum of this process's batch), those of the last layer, `grad_norm` before clipping, `lr`.
        """
        # Dropout is a function of (seed, iteration, process), so that a resumed training repeats it.
        torch.manual_seed(derived_seed("step", self.config.seed, self.iteration, distributed.get_rank()))
        self.detector.train()  # the backbone stays in evaluation mode
        batch = batch.to(self.device)
        outputs = self.detector(batch.images)
        losses = self.criterion(outputs, batch.targets(absolute=self.detector.config.reparam))
        loss = self.criterion.total(losses)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.gradient_clip)
        lr = torch.tensor(float(self.optimizer.param_groups[0]["lr"]))
        self.optimizer.step()
        self.scheduler.step()
        self.iteration += 1
        shown = {name: losses[name].detach() for name in ("loss_ce", "loss_bbox", "loss_giou")}
        return {"loss": loss.detach(), **shown, "grad_norm": norm, "lr": lr}


def train_detector(
    detector: PlainDETR,
    config: DetectionConfig,
    *,
    backbone: str | dict[str, Any],
    train_dataset: CocoDetection | None = None,
) -> DetectorWithProcessor:
    """Train the head, validating and saving on the way. A collective of the world.

    Interrupted, it goes on from the newest checkpoint in the output folder to the same weights: the order of the
    samples, their random changes and dropout are functions of (seed, rank, iteration).

    Args:
        detector: on its device.
        config: how to train, and where files go.
        backbone: what the head file says of the backbone, see `HeadFile`.
        train_dataset: of (image, target); default: that of the configuration.

    Returns:
        The detector with the weights of the last iteration, in evaluation mode.

    Raises:
        ValueError: the configuration has no training set, or values that make no sense.
    """
    dataset = make_train_dataset(config) if train_dataset is None else train_dataset
    epoch, total = schedule_lengths(len(dataset), config)
    trainer = DetectionTrainer(detector, config, total, epoch)
    output_dir = Path(config.output_dir or ".")
    checkpoints = FlatCheckpoints(output_dir, trainer.state(), CheckpointRetentionPolicy.LAST)
    done = trainer.iteration = checkpoints.resume()
    period = config.eval.eval_interval or epoch
    train_probe(
        step=trainer.step,
        batches=make_train_loader(dataset, config, done=done) if done < total else (),
        done=done,
        max_iter=total,
        checkpoints=checkpoints,
        save_period=period,
        evaluate=_Validation(detector, config, output_dir / VALIDATION_FILE, total, done),
        eval_period=period,
        metrics_file=output_dir / METRICS_FILE,
    )
    write_head(output_dir / HEAD_FILE, detector, config, backbone, dataset.categories)
    return with_processor(one_to_one(detector), config)


def schedule_lengths(n_images: int, config: DetectionConfig) -> tuple[int, int]:
    """Iterations of an epoch, and of the whole training.

    Raises:
        ValueError: no epochs.
    """
    if config.scheduler.epochs <= 0:
        raise ValueError(f"scheduler.epochs must be positive, got {config.scheduler.epochs}")
    epoch = max(n_images // (config.bs * distributed.get_world_size()), 1)
    return epoch, max(math.ceil(epoch * config.scheduler.epochs), 1)


def with_processor(detector: PlainDETR, config: DetectionConfig) -> DetectorWithProcessor:
    """The detector as it is used, in evaluation mode."""
    topk = config.eval.topk or detector.config.topk
    return DetectorWithProcessor(detector, PostProcess(topk, detector.config.reparam)).eval()


@contextmanager
def one_to_one_queries(detector: PlainDETR) -> Iterator[PlainDETR]:
    """The detector as at inference, for a while."""
    before = detector.num_queries
    try:
        yield one_to_one(detector)
    finally:
        detector.num_queries = detector.transformer.two_stage_num_proposals = before


class _Validation:
    """Measures on `datasets.val` without test-time augmentation; logs it and adds a line to a file."""

    def __init__(self, detector: PlainDETR, config: DetectionConfig, path: Path, total: int, done: int) -> None:
        self.detector, self.config, self.path, self.total = detector, config, path, total
        self.dataset = open_dataset(config.datasets.val, config) if config.datasets.val else None
        drop_rows_from(path, done + 1)

    def __call__(self, iteration: int) -> float:
        """After `iteration` + 1 iterations; returns AP in percent. The final evaluation is the test's."""
        if self.dataset is None or iteration >= self.total:
            return 0.0
        config, stride = self.config, self.detector.backbone.stride
        with one_to_one_queries(self.detector) as detector:
            figures, _ = evaluate_dataset(
                with_processor(detector, config),
                self.dataset,
                make_views(config, stride),
                num_workers=config.num_workers,
            )
        done = iteration + 1
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        logger.info("validation after %d iterations on %s: %s", done, short_name(config.datasets.val), shown)
        add_row(self.path, done, figures)
        return 100.0 * figures["AP"]


def write_head(
    path: Path,
    detector: PlainDETR,
    config: DetectionConfig,
    backbone: str | dict[str, Any],
    categories: Categories,
) -> None:
    """Write what `dinov3.hub.load_head` makes a detector of (main process only)."""
    if not distributed.is_main_process():
        return
    mean, std = (_three(values) for values in (config.transforms.mean, config.transforms.std))
    evaluation = config.transforms.eval
    head_file = HeadFile(
        task="detection",
        head=head_state(detector),
        config={
            "head": config_values(detector.config),
            "short_side": evaluation.short_side,
            "max_size": evaluation.max_size,
            "category_ids": {str(label): category for label, category in categories.id_of.items()},
        },
        backbone=backbone,
        class_names=categories.class_names,
        mean=mean,
        std=std,
    )
    save_head(path, head_file)


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def start_from(detector: PlainDETR, path: str) -> None:
    """Take the head of an earlier stage; class heads start anew if they are of another number of classes.

    Raises:
        ValueError: anything else that doesn't fit.
    """
    state: Mapping[str, Tensor] = read_state_dict(path)
    own = detector.state_dict()
    kept = {
        key: value
        for key, value in state.items()
        if not (_is_class_head(key) and value.shape[0] != detector.config.num_classes)
    }
    if len(kept) < len(state):
        logger.info("%s has another number of classes: class heads start anew", path)
        kept |= {key: value for key, value in own.items() if _is_class_head(key)}
    load_head_state(detector, kept)


def _is_class_head(key: str) -> bool:
    return key.removeprefix("transformer.decoder.").startswith("class_embed.")
