"""Training of dino.txt, a text encoder aligned with a frozen vision backbone: a script, and what it is made of.

    python -m dinov3.run.submit dinov3/eval/text/train_dinotxt.py --nodes 1
        trainer_config_file=dinov3/eval/text/configs/dinov3_vitl_text.yaml output_dir=OUT train_dataset_str=STRING ...

All keys can be given on the command line, over those of the file. The same command again goes on from the newest
checkpoint, to the same weights.

In the output folder: `eval_config.yaml` (all keys), `clip_model_config.yaml` (the model), `training_metrics.json` (one
line per logged iteration), `ckpt/<iteration>` (what resuming needs), and `eval/training_<iteration>/` with the exported
model (`sharded_model_checkpoint`) and results.
"""

import contextlib
import dataclasses
import gc
import itertools
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov3 import distributed
from dinov3.checkpointer import (
    CheckpointRetentionPolicy,
    find_latest_checkpoint,
    keep_last_n_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from dinov3.configs.config import find_config_file, write_config
from dinov3.eval.helpers import args_dict_to_dataclass, as_value_errors, cli_parser
from dinov3.eval.probe import ProbeCheckpoints, average_gradients, collective_timeout, train_probe
from dinov3.eval.text.build_dinotxt import build_model_and_tokenizer, make_crop_transform
from dinov3.eval.text.config import UNUSED, TextTrainConfig, check_training, model_config_of
from dinov3.eval.text.data import make_train_loader
from dinov3.eval.text.dinotxt_model import DINOTxt
from dinov3.eval.text.gram_loss import gram_loss_fn
from dinov3.eval.text.retrieval import measure_retrieval
from dinov3.eval.text.tokenizer import Tokenizer
from dinov3.fsdp.initialize import is_sharded
from dinov3.loss import memory_efficient_clip_loss
from dinov3.optim.schedules import linear_warmup_cosine_decay
from dinov3.utils.modules import unwrapped_name
from dinov3.utils.reproducibility import derived_seed

__all__ = ["exclude", "include", "main", "train"]

logger = logging.getLogger("dinov3")

MAX_LOGIT_SCALE = math.log(100)
_CHECK_PERIOD = 10
_NO_DECAY = ("bn", "ln", "bias", "logit_scale")


def exclude(name: str, p: Tensor) -> bool:
    """Whether a parameter isn't decayed: vectors and scalars, norms, biases, the scale of the similarities."""
    return p.ndim < 2 or any(part in name for part in _NO_DECAY)


def include(name: str, p: Tensor) -> bool:
    """Whether a parameter is decayed."""
    return not exclude(name, p)


def build_optimizer(
    model: torch.nn.Module, *, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained, in two groups: without and with weight decay."""
    trained = [(unwrapped_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if exclude(name, p)], "weight_decay": 0.0},
        {"params": [p for name, p in trained if include(name, p)], "weight_decay": weight_decay},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas, eps=eps)


def learning_rates(lr: float, warmup_length: int, max_iteration: int) -> NDArray[np.float64]:
    """The learning rate of every iteration: linear from 0, then half a cosine from `lr` to 0."""
    return linear_warmup_cosine_decay(0.0, lr, 0.0, warmup_length, max_iteration)


class Step:
    """One step of the training.

    Args:
        model: in training mode.
        optimizer: over its trained parameters.
        gram_loss_weight: None: no Gram loss.
        patch_sampling_rate, normalize_patch_tokens: of the Gram loss, see `gram_loss_fn`.
    """

    def __init__(
        self,
        model: DINOTxt,
        optimizer: torch.optim.Optimizer,
        *,
        gram_loss_weight: float | None = None,
        patch_sampling_rate: float = 1.0,
        normalize_patch_tokens: bool = True,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.gram_loss_weight = gram_loss_weight
        self.patch_sampling_rate = patch_sampling_rate
        self.normalize_patch_tokens = normalize_patch_tokens
        # Sharded parameters average their gradients themselves; the scale is never sharded.
        self.averaged = [model.logit_scale] if is_sharded(model) else [p for p in model.parameters() if p.requires_grad]

    def __call__(self, images: Tensor, tokens: Tensor, lr: float) -> dict[str, Tensor]:
        """Train on a batch; returns what is logged, averaged over the processes (nothing waits for the device).

        Args:
            images: `[B, 3, H, W]`, as many on every process.
            tokens: ids of their captions `[B, N]`.
            lr: learning rate.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        image_features, text_features, scale, patch_tokens, backbone_patch_tokens = self.model(images, tokens)
        # All batches are of one size: incomplete ones are left out.
        losses = {
            "contrastive_loss": memory_efficient_clip_loss(image_features, text_features, scale, check_sizes=False)
        }
        total = losses["contrastive_loss"]
        if self.gram_loss_weight is not None:
            losses["gram_loss"] = gram_loss_fn(
                backbone_patch_tokens, patch_tokens, self.patch_sampling_rate, self.normalize_patch_tokens
            )
            total = total + self.gram_loss_weight * losses["gram_loss"]
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        average_gradients(p for p in self.averaged if p.grad is not None)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)
        averaged = distributed.reduce_dict({name: loss.detach() for name, loss in losses.items()})
        return {**averaged, "lr": torch.tensor(lr), "logit_scale": self.model.logit_scale.detach().exp()}


class FiniteCheck:
    """Ends the training when a loss was not finite on any process.

    Losses that were averaged over processes are summed on the device, and the sum is looked at now and then: it isn't
    finite if one of them was not, and all processes see the same.
    """

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._n_added = 0

    def add(self, metrics: Mapping[str, Tensor], iteration: int) -> None:
        """Take the losses of an iteration, and look at every tenth."""
        self._sum = self._sum + sum(value for name, value in metrics.items() if name.endswith("_loss"))
        self._n_added += 1
        if (iteration + 1) % _CHECK_PERIOD == 0:
            self.look(iteration)

    def look(self, iteration: int) -> None:
        """Wait for the device.

        Raises:
            RuntimeError: a loss was not finite.
        """
        if not math.isfinite(float(self._sum)):
            raise RuntimeError(
                f"a loss is not finite in one of the iterations {iteration - self._n_added + 1} to {iteration}. The "
                "newest checkpoint holds weights from before; resume from it with a lower learning rate, or look for "
                "broken images"
            )
        self._sum, self._n_added = 0.0, 0


class TextCheckpoints(ProbeCheckpoints):
    """Checkpoints `ckpt/<iteration>` of torch.distributed.checkpoint, which don't depend on the number of processes.

    Args:
        folder: made when needed.
        model: trained; frozen backbones are not in its state dict.
        optimizer: of the model.
        max_to_keep: how many remain; None: all.
        before_saving: called with the iteration, may refuse by an error.
    """

    def __init__(
        self,
        folder: Path,
        model: DINOTxt,
        optimizer: torch.optim.Optimizer,
        max_to_keep: int | None,
        before_saving: Callable[[int], None],
    ) -> None:
        super().__init__(folder, {}, CheckpointRetentionPolicy.ALL)
        self.model, self.optimizer, self.max_to_keep = model, optimizer, max_to_keep
        self.before_saving = before_saving

    def resume(self, source: str | os.PathLike[str] | None = None) -> int:
        """Load the newest checkpoint; return the number of iterations that are done."""
        newest = find_latest_checkpoint(self.folder if source is None else source)
        if newest is None:
            logger.info("no checkpoint in %s: the training starts from its initial weights", self.folder)
            return 0
        iteration: int = load_checkpoint(newest, model=self.model, optimizer=self.optimizer)
        return iteration + 1

    def save(self, name: str, iteration: int) -> None:
        """Write one checkpoint."""
        self.before_saving(iteration)
        save_checkpoint(self.folder / name, iteration=iteration, model=self.model, optimizer=self.optimizer)

    def save_regular(self, iteration: int) -> None:
        """Write the checkpoint of an iteration, and delete the oldest beyond those to keep."""
        self.save(str(iteration), iteration)
        if distributed.is_main_process():
            keep_last_n_checkpoints(self.folder, self.max_to_keep)

    def offer_best(self, accuracy: float, iteration: int) -> None:
        """Remember the best; every evaluation has exported its model already."""
        self.best_accuracy = max(self.best_accuracy, accuracy)

    def finish(self, iteration: int) -> None:
        """Write the checkpoint of the last iteration."""
        self.save_regular(iteration)

    def is_finished(self) -> bool:
        """Whether whatever was resumed from is the end."""
        return find_latest_checkpoint(self.folder) is not None

    def clean_up(self) -> None:
        """Nothing: `save_regular` has deleted what isn't kept."""


class TextTrainer:
    """The training of a model: what the loop calls, and where it stands.

    Args:
        config: how to train.
        model: from `build_model_and_tokenizer`.
        tokenizer: of the captions.
    """

    def __init__(self, config: TextTrainConfig, model: DINOTxt, tokenizer: Tokenizer) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.output_dir = Path(config.output_dir)
        betas = (config.beta1, config.beta2)
        self.optimizer = build_optimizer(model, weight_decay=config.weight_decay, betas=betas, eps=config.eps)
        self.train_on = Step(
            model,
            self.optimizer,
            gram_loss_weight=config.vision_model_gram_loss_weight if config.vision_model_use_gram_loss else None,
            patch_sampling_rate=config.vision_model_patch_sampling_rate_for_gram_loss,
            normalize_patch_tokens=config.vision_model_normalize_patch_tokens_for_gram_loss,
        )
        self.finite = FiniteCheck()
        self.checkpoints = TextCheckpoints(
            self.output_dir / "ckpt", model, self.optimizer, config.max_checkpoints_to_keep, self.finite.look
        )
        self.rates = learning_rates(config.lr, config.warmup_length, config.max_iteration)
        self.iteration = 0
        self.results: dict[str, float] = {}

    def resume(self) -> int:
        """Go on from the newest checkpoint, unless `no_resume`; return the number of iterations that are done."""
        if self.config.no_resume:
            set_aside(self.checkpoints.folder)
        self.iteration = self.checkpoints.resume()
        return self.iteration

    def step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Train on images `[B, 3, H, W]` and token ids `[B, N]`; returns what is logged."""
        torch.manual_seed(derived_seed("text", self.config.seed, self.iteration, distributed.get_rank()))
        images, tokens = (tensor.to(self.model.logit_scale.device, non_blocking=True) for tensor in batch)
        metrics = self.train_on(images, tokens, float(self.rates[self.iteration]))
        self.finite.add(metrics, self.iteration)
        self.iteration += 1
        if self.iteration % self.config.gc_freq == 0:
            gc.collect()
        return metrics

    def evaluate(self, iteration: int) -> float:
        """Export and measure, at an iteration (counted from 0) or in the end; returns the score in percent."""
        last = min(iteration, self.config.max_iteration - 1)
        self.finite.look(last)
        folder = self.output_dir / "eval" / f"training_{last}"
        self.results = export_and_evaluate(self.config, self.model, self.tokenizer, folder)
        return self.results.get("text_to_image_recall@1", 0.0)


def train(config: TextTrainConfig, model: DINOTxt, train_transform: Any, tokenizer: Tokenizer) -> dict[str, float]:
    """Train to the end, evaluating and saving on the way. A collective of the world.

    Everything random is a function of (seed, iteration, rank): an interrupted training goes on to the same weights, bit
    for bit on a CPU.

    Args:
        config: how to train, and where results go.
        model: from `build_model_and_tokenizer`.
        train_transform: of the images.
        tokenizer: of the captions.

    Returns:
        Results of the last evaluation.

    Raises:
        RuntimeError: a loss is not finite.
        Stopped: a signal asked to stop; the state is saved.
    """
    trainer = TextTrainer(config, model, tokenizer)
    done = trainer.resume()
    with _manual_garbage_collection():
        train_probe(
            step=trainer.step,
            batches=make_train_loader(config, train_transform, tokenizer, model.context_length, done),
            done=done,
            max_iter=config.max_iteration,
            checkpoints=trainer.checkpoints,
            save_period=config.checkpointing_period,
            evaluate=trainer.evaluate,
            eval_period=config.eval_freq if config.eval_freq > 0 else config.max_iteration,
            metrics_file=trainer.output_dir / "training_metrics.json",
        )
    return trainer.results


@contextlib.contextmanager
def _manual_garbage_collection() -> Iterator[None]:
    """No collection but those of the loop, which come on all processes at the same time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def set_aside(folder: Path) -> None:
    """Rename a folder of checkpoints, so that those of a new training are not taken for older ones of it."""
    if distributed.is_main_process() and find_latest_checkpoint(folder) is not None:
        number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}_before_{n}").exists())
        target = folder.with_name(f"{folder.name}_before_{number}")
        folder.rename(target)
        logger.info("the checkpoints of an earlier training are in %s", target)
    if distributed.get_world_size() > 1:
        torch.distributed.barrier()


def export_and_evaluate(
    config: TextTrainConfig, model: DINOTxt, tokenizer: Tokenizer, folder: Path
) -> dict[str, float]:
    """Export the model alone, and measure retrieval if there is data for it. A collective of the world.

    Args:
        config: names the data.
        model: stays in training mode.
        tokenizer: of its captions.
        folder: receives `sharded_model_checkpoint` and `results.json`.

    Returns:
        The results, empty without data.
    """
    save_checkpoint(folder / "sharded_model_checkpoint", iteration=folder.name, model=model)
    if not config.eval_dataset_str:
        return {}
    results, _ = measure_retrieval(
        model,
        tokenizer,
        config.eval_dataset_str,
        make_crop_transform(config.vision_model_train_img_size),
        batch_size=config.batch_size,
        num_workers=config.num_workers,
    )
    logger.info("%s: %s", folder.name, results)
    if distributed.is_main_process():
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def parse(argv: Sequence[str]) -> TextTrainConfig:
    """The configuration of the arguments: defaults, `trainer_config_file`, then `key=value`, each over the one before.

    `output-dir=X`, `output_dir=X`, `--output-dir X` and `--output-dir=X` mean the same.

    Raises:
        ValueError: unknown, missing or impossible values.
        FileNotFoundError: no such configuration file.
    """
    argv = [f"--{argument}" if argument.startswith("output-dir=") else argument for argument in argv]
    values = cli_parser(argv)
    file = values.pop("trainer_config_file", None)
    if file is not None:
        values["config_file"] = str(find_config_file(file))
    if not any(argument.startswith(("output_dir=", "--output-dir")) for argument in argv):
        del values["output_dir"]  # the file may have one
    with as_value_errors():
        config, _ = args_dict_to_dataclass(values, TextTrainConfig, save_config=False)
    config.output_dir = config.output_dir or "."
    check_training(config)
    return config


def check_arguments(argv: Sequence[str], n_processes: int) -> None:
    """Refuse arguments that a training can't be started with: the launcher asks before it starts any process.

    Raises:
        ValueError: see `parse`.
    """
    parse(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see the module's docstring. Returns 0."""
    from dinov3.run.init import job_context

    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        keys = "\n".join(f"{field.name}: {field.default}" for field in dataclasses.fields(TextTrainConfig))
        sys.stdout.write(f"{__doc__}\nKeys and defaults:\n\n{keys}\n")
        return 0
    config = parse(argv)
    with job_context(output_dir=config.output_dir, seed=config.seed, distributed_timeout=collective_timeout()):
        idle = [key for key in UNUSED if getattr(config, key) != getattr(TextTrainConfig, key)]
        if idle:
            logger.warning("keys that nothing reads (accepted for old files): %s", ", ".join(idle))
        model_config = model_config_of(config)
        if distributed.is_main_process():
            write_config(config, config.output_dir, "eval_config.yaml")
            write_config(model_config, config.output_dir, "clip_model_config.yaml")
        model, transform, tokenizer = build_model_and_tokenizer(
            model_config,
            use_fsdp=config.use_fsdp,
            do_compile=config.do_compile,
            use_ac=config.use_ac,
            use_full_ac=config.use_full_ac,
            use_cuda_graphs=config.use_cuda_graphs,
            param_dtype_str=config.param_dtype_str,
            reduce_dtype_str=config.reduce_dtype_str,
        )
        train(config, model, transform, tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
