"""Supervised fine-tuning of a backbone on labelled images: a script, and what it is made of.

    python dinov3/eval/finetune.py output_dir=<OUT> train.dataset=<STRING> train.val_dataset=<STRING>
        model.dino_hub=dinov3_vits16 model.pretrained_weights=<FILE>

All weights learn, deeper layers faster (`optimizer.layerwise_decay`), or, with `method=lora`, low-rank adapters of the
library peft. The classifier sees the class token and the mean of the patches. Interrupted, the same command goes on.

In the output folder: `results-finetune.csv`, and of the best evaluation `backbone.pth` (adapters merged; every
`weights=` reads it) and `classifier.pth` (`weight` `[classes, 2 * D]`, `bias`).
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dinov3 import distributed
from dinov3.checkpointer import CheckpointRetentionPolicy
from dinov3.data import (
    make_classification_eval_transform,
    make_classification_train_transform,
    make_dataset,
)
from dinov3.eval.config import MISSING, ModelConfig, TransformConfig
from dinov3.eval.data import get_num_classes, make_endless_loader
from dinov3.eval.evaluate import evaluate, make_eval_data_loader
from dinov3.eval.helpers import args_dict_to_dataclass, check_eval_arguments, run_main, write_results
from dinov3.eval.metrics import ClassificationMetricType, build_classification_metric
from dinov3.eval.probe import ProbeCheckpoints, average_gradients, broadcast_parameters, train_probe
from dinov3.eval.setup import autocast_context, load_model_and_context
from dinov3.models.backbone import Backbone
from dinov3.optim.param_groups import get_params_groups_with_decay
from dinov3.optim.schedules import linear_warmup_cosine_decay
from dinov3.utils.device import default_device
from dinov3.utils.files import atomically
from dinov3.utils.reproducibility import derived_seed

logger = logging.getLogger("dinov3")

RESULTS_FILENAME = "results-finetune.csv"
_METRIC = ClassificationMetricType.MEAN_ACCURACY


class Method(Enum):
    """What learns besides the classifier."""

    FULL = "full"
    LORA = "lora"


@dataclass
class FineTuneTrainConfig:
    """On what, and for how long."""

    dataset: str = MISSING
    """Dataset string."""
    val_dataset: str = MISSING
    """Dataset string. Its accuracy chooses what is kept."""
    batch_size: int = 64
    """Per process."""
    num_workers: int = 8
    """Of the data loaders, per process."""
    epochs: int = 20
    epoch_length: int | None = None
    """Iterations; null: the data set once."""
    warmup_epochs: float = 1.0
    """Epochs in which the learning rate rises; after them it falls along a cosine."""
    label_smoothing: float = 0.1
    seed: int = 0


@dataclass
class FineTuneOptimizerConfig:
    """AdamW."""

    lr: float = 5e-4
    """Of the classifier and the last layer, for a batch of 256; scaled in proportion to the batch of all processes."""
    layerwise_decay: float = 0.75
    """Factor of the learning rate from a layer to the one before it; 1: the same for all."""
    weight_decay: float = 0.05
    """Not of biases, norms and layer scales."""
    gradient_clip: float = 3.0
    """Largest norm of the gradient."""


@dataclass
class LoraConfig:
    """Low-rank adapters of queries, keys, values, outputs and the feed-forward networks."""

    rank: int = 8
    alpha: int = 16
    """Adapters are multiplied by alpha / rank."""


@dataclass
class FineTuneConfig:
    """Configuration of the fine-tuning."""

    model: ModelConfig = MISSING
    method: Method = Method.FULL
    train: FineTuneTrainConfig = field(default_factory=FineTuneTrainConfig)
    optimizer: FineTuneOptimizerConfig = field(default_factory=FineTuneOptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    transform: TransformConfig = field(default_factory=TransformConfig)
    output_dir: str = ""


class FineTunedClassifier(nn.Module):
    """A backbone and a linear classifier on its class token and the mean of its patches.

    Args:
        backbone: a `Backbone`, perhaps with adapters.
        embed_dim: D.
        num_classes: of the classifier.
    """

    def __init__(self, backbone: nn.Module, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(2 * embed_dim, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, classes]` of images `[B, C, H, W]`."""
        features = self.backbone(images, is_training=True)
        tokens = torch.cat([features["x_norm_clstoken"], features["x_norm_patchtokens"].mean(dim=1)], dim=-1)
        logits: Tensor = self.classifier(tokens.float())
        return logits


def add_adapters(backbone: nn.Module, config: LoraConfig) -> nn.Module:
    """The backbone with adapters of peft, the only parameters that learn.

    Raises:
        ImportError: peft isn't installed.
        ValueError: a backbone without attention.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("method=lora needs the library peft: pip install peft") from error
    if not hasattr(backbone, "blocks"):
        raise ValueError(f"method=lora adapts attention, which {type(backbone).__name__} lacks: use method=full")
    targets = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2|w1|w2|w3))"
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets)
    return cast(nn.Module, peft.get_peft_model(backbone, settings))


def parameter_groups(model: FineTunedClassifier, config: FineTuneOptimizerConfig, lr: float) -> list[dict[str, Any]]:
    """AdamW's groups: learning rates by layer, no decay of biases, norms and layer scales."""
    rated = get_params_groups_with_decay(model.backbone, config.layerwise_decay)
    rated += get_params_groups_with_decay(model.classifier)
    return [
        {
            "params": group["params"],
            "lr": lr * group["lr_multiplier"],
            "weight_decay": config.weight_decay * group["wd_multiplier"],
        }
        for group in rated
    ]


class _Trained:
    """What a checkpoint holds of a model: what learns. The rest is where it came from."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self._parameters.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state.keys() != self._parameters.keys():
            differing = sorted(state.keys() ^ self._parameters.keys())
            raise ValueError(f"the checkpoint is of another model or method; they differ in {', '.join(differing[:5])}")
        with torch.no_grad():
            for name, value in state.items():
                self._parameters[name].copy_(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see the module's docstring. Returns 0."""
    return run_main(argv, benchmark_launcher, FineTuneConfig)


check_arguments = partial(check_eval_arguments, FineTuneConfig)


def benchmark_launcher(eval_args: Mapping[str, Any]) -> dict[str, float]:
    """Fine-tune as the parsed arguments say, write the results, and return them."""
    config, output_dir = args_dict_to_dataclass(eval_args, FineTuneConfig)
    backbone, context = load_model_and_context(
        config.model, output_dir, allow_unknown_keys=bool(eval_args.get("allow_unknown_keys"))
    )
    results = finetune(backbone=backbone, autocast_dtype=context["autocast_dtype"], config=config)
    write_results(results, output_dir, RESULTS_FILENAME)
    return results


def finetune(*, backbone: nn.Module, autocast_dtype: torch.dtype, config: FineTuneConfig) -> dict[str, float]:
    """Train, and keep the best. A collective of the world.

    Args:
        backbone: changed in place.
        autocast_dtype: what it runs in.
        config: what to train.

    Returns:
        `{"<dataset string>_accuracy": percent}` of the validation set, the best evaluation.

    Raises:
        ValueError: a data set that is smaller than a batch, or settings that don't fit.
    """
    training = _FineTuning(backbone, autocast_dtype, config)
    training.run()
    return {f"{config.train.val_dataset}_accuracy": training.checkpoints.best_accuracy}


class _FineTuning:
    """The parts of one training, and what the loop calls."""

    def __init__(self, backbone: nn.Module, autocast_dtype: torch.dtype, config: FineTuneConfig) -> None:
        self.config, self.device = config, default_device()
        self.autocast = partial(autocast_context, self.device, autocast_dtype)
        train = config.train
        transform = make_classification_train_transform(crop_size=config.transform.crop_size)
        self.dataset = make_dataset(dataset_str=train.dataset, transform=transform)
        transform = make_classification_eval_transform(
            resize_size=config.transform.resize_size, crop_size=config.transform.crop_size
        )
        self.val_dataset = make_dataset(dataset_str=train.val_dataset, transform=transform)
        self.num_classes = get_num_classes(self.dataset)

        total_batch = train.batch_size * distributed.get_world_size()
        epoch_length = train.epoch_length or len(self.dataset) // total_batch
        if epoch_length == 0:
            raise ValueError(
                f"train.dataset has {len(self.dataset)} images, fewer than one batch of {total_batch}: lower "
                "train.batch_size, or set train.epoch_length"
            )
        self.epoch_length, self.max_iter = epoch_length, train.epochs * epoch_length

        torch.manual_seed(train.seed)
        embed_dim = cast(Backbone, backbone).embed_dim
        adapted = add_adapters(backbone, config.lora) if config.method is Method.LORA else backbone
        self.model = FineTunedClassifier(adapted, embed_dim, self.num_classes).to(self.device)
        self.parameters = [value for value in self.model.parameters() if value.requires_grad]
        broadcast_parameters(self.parameters)
        lr = config.optimizer.lr * total_batch / 256
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, config.optimizer, lr))
        factors = linear_warmup_cosine_decay(
            start=0.0,
            peak=1.0,
            end=0.0,
            warmup_iterations=min(round(train.warmup_epochs * epoch_length), self.max_iter - 1),
            total_iterations=self.max_iter,
        )
        self.scheduler = LambdaLR(self.optimizer, lambda iteration: float(factors[min(iteration, self.max_iter - 1)]))
        self.checkpoints = ProbeCheckpoints(
            Path(config.output_dir, "checkpoints"),
            {"model": _Trained(self.model), "optimizer": self.optimizer, "scheduler": self.scheduler},
            CheckpointRetentionPolicy.LAST,
        )

    def run(self) -> None:
        """Train to the end, from the newest checkpoint on."""
        train = self.config.train
        self.iteration = done = self.checkpoints.resume()
        batches = make_endless_loader(
            self.dataset,
            batch_size=train.batch_size,
            num_workers=train.num_workers,
            seed=train.seed,
            done=done,
        )
        self.model.train()
        train_probe(
            step=self.step,
            batches=batches,
            done=done,
            max_iter=self.max_iter,
            checkpoints=self.checkpoints,
            save_period=self.epoch_length,
            evaluate=self.evaluate,
            eval_period=self.epoch_length,
        )

    def step(self, batch: Any) -> dict[str, Tensor]:
        """One update; random parts of the network are a function of (seed, iteration, rank)."""
        torch.manual_seed(derived_seed("finetune", self.config.train.seed, self.iteration, distributed.get_rank()))
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        with self.autocast():
            logits = self.model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.train.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        average_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.gradient_clip)
        self.optimizer.step()
        self.scheduler.step()
        self.iteration += 1
        return {"loss": loss.detach(), "gradient_norm": norm}

    def evaluate(self, iteration: int) -> float:
        """Accuracy on the validation set in percent; the best so far is written out."""
        loader = make_eval_data_loader(
            dataset=self.val_dataset,
            batch_size=self.config.train.batch_size,
            num_workers=self.config.train.num_workers,
            metric_type=_METRIC,
        )
        metric = build_classification_metric(_METRIC, num_classes=self.num_classes, dataset=self.val_dataset)
        with self.autocast():
            _, metrics, _ = evaluate(
                self.model, loader, {"top": lambda x, y: {"preds": x, "target": y}}, {"top": metric}, self.device
            )
        self.model.train()
        accuracy = 100.0 * metrics["top"]["top-1"].item()
        logger.info("after %d iterations: %.2f %% of the validation set", min(iteration + 1, self.max_iter), accuracy)
        if accuracy >= self.checkpoints.best_accuracy and distributed.is_main_process():
            self.write()
        return accuracy

    def write(self) -> None:
        """`backbone.pth` and `classifier.pth`."""
        backbone, folder = self.model.backbone, Path(self.config.output_dir)
        if self.config.method is Method.LORA:
            backbone.merge_adapter()  # type: ignore[operator]
            state = {
                name.replace(".base_layer.", "."): value.detach().cpu().clone()
                for name, value in backbone.get_base_model().state_dict().items()  # type: ignore[operator]
                if ".lora_" not in name
            }
            backbone.unmerge_adapter()  # type: ignore[operator]
        else:
            state = {name: value.detach().cpu() for name, value in backbone.state_dict().items()}
        classifier = {name: value.detach().cpu() for name, value in self.model.classifier.state_dict().items()}
        for name, content in (("backbone.pth", state), ("classifier.pth", classifier)):
            with atomically(folder / name) as file:
                torch.save(content, file)


if __name__ == "__main__":
    sys.exit(main())
