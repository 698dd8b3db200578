"""Object detection: train a head and test it, or test a trained one. See `dinov3.eval.detection.recipe` for calls."""

import difflib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov3 import distributed
from dinov3.checkpointer.heads import HEAD_FILE
from dinov3.checkpointer.weights import read_state_dict
from dinov3.eval.detection.config import DetectionHeadConfig
from dinov3.eval.detection.data import make_train_dataset
from dinov3.eval.detection.eval import evaluate_detector
from dinov3.eval.detection.models.detr import PlainDETR, build_model
from dinov3.eval.detection.models.processor import DetectorWithProcessor, load_head_state, one_to_one
from dinov3.eval.detection.recipe import DetectionConfig
from dinov3.eval.detection.train import start_from, train_detector, with_processor
from dinov3.eval.helpers import (
    args_dict_to_dataclass,
    check_arguments_with,
    run_main,
    with_config_alias,
    write_config,
    write_results,
)
from dinov3.eval.setup import describe_model, load_model_and_context
from dinov3.hub import load_head
from dinov3.hub.detectors import dinov3_vit7b16_de
from dinov3.utils.device import default_device
from dinov3.utils.reproducibility import fix_random_seeds

logger = logging.getLogger("dinov3")

RESULTS_FILENAME = "results-detection.csv"
CONFIG_FILENAME = "detection_config.yaml"
HUB_ENTRY = "dinov3_vit7b16_de"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see `dinov3.eval.detection.recipe`. Returns 0."""
    return run_main(argv, benchmark_launcher, DetectionConfig)


def read_config(eval_args: Mapping[str, Any]) -> DetectionConfig:
    """The configuration of the parsed arguments; `config` (or `config_file`) names a YAML file below them.

    Raises:
        ValueError: both names of the file, no backbone, or unknown fields of the head. OmegaConf's errors: unknown
            keys, wrong values.
    """
    config, output_dir = args_dict_to_dataclass(with_config_alias(eval_args), DetectionConfig, save_config=False)
    config = replace(config, output_dir=output_dir)
    known = [field.name for field in fields(DetectionHeadConfig)]
    for name in config.head:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"unknown key 'head.{name}'; {hint}")
    if config.model is None and config.load_from != HUB_ENTRY:
        raise ValueError(
            "give the backbone (model.dino_hub=<name>, or model.config_file=<yaml> and "
            f"model.pretrained_weights=<file>) or load_from={HUB_ENTRY}"
        )
    if (config.head_weights or config.backbone_weights) and config.load_from != HUB_ENTRY:
        raise ValueError(f"head_weights and backbone_weights belong to load_from={HUB_ENTRY}")
    return config


check_arguments = partial(check_arguments_with, read_config)


def benchmark_launcher(eval_args: Mapping[str, Any]) -> dict[str, float]:
    """Train and test as the parsed arguments say, write the results, and return them."""
    config = read_config(eval_args)
    fix_random_seeds(config.seed + distributed.get_rank())
    output_dir = Path(config.output_dir or ".")
    write_config(config, output_dir / CONFIG_FILENAME)
    backbone, dtype = _backbone(config, allow_unknown_keys=bool(eval_args.get("allow_unknown_keys")))
    if config.load_from:
        model, id_of = load_detector(config, backbone), None
        head_file = getattr(model, "head_file", None)
        if head_file is not None:
            id_of = {int(label): category for label, category in head_file.config["category_ids"].items()}
    else:
        assert backbone is not None
        assert config.model is not None
        model, id_of = _train(config, backbone, dtype, describe_model(config.model)), None
    detector = model.detector
    assert isinstance(detector, PlainDETR)
    detector.backbone.extractor.autocast_dtype = dtype
    if not config.datasets.val:
        logger.info("no datasets.val: nothing to test")
        return {}
    results = evaluate_detector(model, config, multiple=detector.backbone.stride, id_of=id_of)
    write_results(results, output_dir, RESULTS_FILENAME)
    return results


def _backbone(config: DetectionConfig, *, allow_unknown_keys: bool) -> tuple[nn.Module | None, torch.dtype]:
    """The backbone (None with the hub's detector) and what it computes in."""
    backbone, dtype = None, torch.float32
    if config.model is not None and config.load_from != HUB_ENTRY:
        backbone, context = load_model_and_context(
            config.model, config.output_dir, allow_unknown_keys=allow_unknown_keys
        )
        dtype = context["autocast_dtype"]
    return backbone, dtype if config.model_dtype is None else getattr(torch, config.model_dtype.value)


def _train(
    config: DetectionConfig, backbone: nn.Module, dtype: torch.dtype, description: str | dict[str, Any]
) -> DetectorWithProcessor:
    dataset = make_train_dataset(config)
    needed = dataset.categories.n_classes
    head = DetectionHeadConfig(**{"num_classes": needed, **config.head})
    if head.num_classes < needed:
        raise ValueError(
            f"head.num_classes={head.num_classes}, but {dataset.annotation_file} needs {needed} (the largest class and "
            "0): leave it out"
        )
    detector = build_model(backbone, head).to(default_device())
    detector.backbone.extractor.autocast_dtype = dtype
    if config.init_from:
        start_from(detector, config.init_from)
    n_parameters = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    logger.info("training a detection head of %d parameters on %d images", n_parameters, len(dataset))
    return train_detector(detector, config, backbone=description, train_dataset=dataset)


def load_detector(config: DetectionConfig, backbone: nn.Module | None) -> DetectorWithProcessor:
    """The detector that `load_from` names, on its device, in evaluation mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights that don't fit.
    """
    source = str(config.load_from)
    if source == HUB_ENTRY:
        given = {"weights": config.head_weights, "backbone_weights": config.backbone_weights}
        model = dinov3_vit7b16_de(**{name: value for name, value in given.items() if value})  # type: ignore[arg-type]
        detector = model.detector
        assert isinstance(detector, PlainDETR)
        return with_processor(detector, config).to(default_device())
    assert backbone is not None
    if Path(source).is_dir() or Path(source).name == HEAD_FILE:
        loaded = load_head(source, backbone=backbone)
        assert isinstance(loaded, DetectorWithProcessor)
        if config.eval.topk:
            loaded.postprocessor.topk = config.eval.topk  # type: ignore[assignment]
        return loaded.to(default_device())
    detector = build_model(backbone, DetectionHeadConfig(**config.head))
    load_head_state(detector, read_state_dict(source))
    return with_processor(one_to_one(detector), config).to(default_device())


if __name__ == "__main__":
    sys.exit(main())
