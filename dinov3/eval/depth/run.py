"""Depth: train a head and test it, or test a trained one. See `dinov3.eval.depth.config` for calls and keys."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from dinov3 import distributed
from dinov3.eval.depth.config import DecoderConfig, DepthConfig
from dinov3.eval.depth.eval import test_depther
from dinov3.eval.depth.models import Depther, make_depther_from_config
from dinov3.eval.depth.train import parameters_of, train_depther
from dinov3.eval.helpers import (
    args_dict_to_dataclass,
    check_arguments_with,
    run_main,
    with_config_alias,
    write_config,
    write_results,
)
from dinov3.eval.setup import describe_model, load_model_and_context
from dinov3.hub.depthers import dinov3_vit7b16_dd, dinov3_vitl16_chmv2
from dinov3.utils.device import default_device
from dinov3.utils.reproducibility import fix_random_seeds

logger = logging.getLogger("dinov3")

RESULTS_FILENAME = "results-depth.csv"
CONFIG_FILENAME = "depth_config.yaml"

_HUB: dict[str, Callable[..., Depther]] = {
    "dinov3_vit7b16_dd": dinov3_vit7b16_dd,
    "dinov3_vitl16_chmv2": dinov3_vitl16_chmv2,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see `dinov3.eval.depth.config`. Returns 0."""
    return run_main(argv, benchmark_launcher, DepthConfig)


def read_config(eval_args: Mapping[str, Any]) -> DepthConfig:
    """The configuration of the parsed arguments; `config` (or `config_file`) names a YAML file below them.

    Raises:
        ValueError: both names of the file, or no backbone. OmegaConf's errors: unknown keys, wrong values.
    """
    config, output_dir = args_dict_to_dataclass(with_config_alias(eval_args), DepthConfig, save_config=False)
    config = replace(config, output_dir=output_dir)
    if config.model is None and config.load_from not in _HUB:
        raise ValueError(
            "give a backbone (model.dino_hub=<name>, or model.config_file=<yaml>, model.pretrained_weights=<path>) "
            f"or load_from=<{' | '.join(_HUB)}>"
        )
    return config


check_arguments = partial(check_arguments_with, read_config)


def benchmark_launcher(eval_args: Mapping[str, Any]) -> dict[str, float]:
    """Train and test as the parsed arguments say, write the results, and return them."""
    config = read_config(eval_args)
    fix_random_seeds(config.seed + distributed.get_rank())
    depther, config = build_or_load(config, allow_unknown_keys=bool(eval_args.get("allow_unknown_keys")))
    output_dir = Path(config.output_dir or ".")
    write_config(config, output_dir / CONFIG_FILENAME)
    if not config.load_from:
        assert config.model is not None
        logger.info("training a %s head of %d parameters", config.decoder_head.type, parameters_of([depther.decoder]))
        depther = train_depther(depther, config, backbone=describe_model(config.model))
    if config.load_from is None and not config.datasets.test:
        logger.info("no datasets.test: nothing to test")
        return {}
    results = test_depther(depther, config)
    write_results(results, output_dir, RESULTS_FILENAME)
    return results


def build_or_load(config: DepthConfig, *, allow_unknown_keys: bool = False) -> tuple[Depther, DepthConfig]:
    """The depther on its device, and the configuration with what is known of its head."""
    dtype = None if config.model_dtype is None else getattr(torch, config.model_dtype.value)
    if config.load_from in _HUB:
        given = {"weights": config.head_weights, "backbone_weights": config.backbone_weights}
        depther = _HUB[config.load_from](
            autocast_dtype=dtype or torch.float32, **{name: source for name, source in given.items() if source}
        )
        return depther.to(default_device()), replace(config, decoder_head=cast(DecoderConfig, depther.decoder_config))
    if config.head_weights or config.backbone_weights:
        raise ValueError(f"head_weights and backbone_weights belong to load_from=<{' | '.join(_HUB)}>")
    assert config.model is not None
    backbone, context = load_model_and_context(config.model, config.output_dir, allow_unknown_keys=allow_unknown_keys)
    depther = make_depther_from_config(
        backbone, config.decoder_head, config.load_from or None, autocast_dtype=dtype or context["autocast_dtype"]
    )
    return depther, config


if __name__ == "__main__":
    sys.exit(main())
