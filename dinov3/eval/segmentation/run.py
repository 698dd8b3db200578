"""Semantic segmentation on a frozen backbone: train a head, or evaluate a trained one.

    python dinov3/eval/segmentation/run.py model.dino_hub=dinov3_vit7b16 datasets.root=<DIR> --output-dir <OUT>
        config=dinov3/eval/segmentation/configs/config-ade20k-linear-training.yaml
    python dinov3/eval/segmentation/run.py load_from=dinov3_vit7b16_ms datasets.root=<DIR> --output-dir <OUT>
        config=dinov3/eval/segmentation/configs/config-ade20k-m2f-inference.yaml

With `load_from=<name or file>` the head is evaluated, otherwise one is trained. Values come from the defaults, then the
YAML file, then the command line.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dinov3.eval.helpers import (
    args_dict_to_dataclass,
    check_arguments_with,
    run_main,
    with_config_alias,
    write_config,
    write_results,
)
from dinov3.eval.segmentation.config import SegmentationConfig
from dinov3.eval.segmentation.eval import test_segmentation
from dinov3.eval.segmentation.train import train_segmentation
from dinov3.eval.segmentation.weights import HUB_DECODER
from dinov3.eval.setup import load_model_and_context

logger = logging.getLogger("dinov3")

RESULTS_FILENAME = "results-semantic-segmentation.csv"
MAIN_METRICS = ["mIoU"]
_CONFIG_FILENAME = "segmentation_config.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: see the module's docstring. Returns 0."""
    return run_main(argv, benchmark_launcher, SegmentationConfig)


def read_config(eval_args: Mapping[str, Any], save_config: bool = True) -> tuple[SegmentationConfig, str]:
    """The configuration of the parsed arguments, and the output folder.

    Args:
        eval_args: nested values; `config` or `config_file` names a YAML file with values below these.
        save_config: write `eval_config.yaml` if it is `config_file`.

    Raises:
        ValueError: both names of the file are given. OmegaConf's errors: unknown keys, wrong values.
    """
    values = with_config_alias(eval_args)
    return args_dict_to_dataclass(values, SegmentationConfig, save_config=save_config and "config_file" in eval_args)


check_arguments = partial(check_arguments_with, partial(read_config, save_config=False))


def benchmark_launcher(eval_args: Mapping[str, Any]) -> dict[str, float]:
    """Run as the parsed arguments say, write configuration and results, and return the results.

    Raises:
        ValueError: no backbone is given; besides the errors of `read_config`.
    """
    config, output_dir = read_config(eval_args)
    config.output_dir = output_dir
    write_config(config, Path(output_dir) / _CONFIG_FILENAME)
    backbone = None
    if config.model is not None and config.load_from != HUB_DECODER:
        backbone, _ = load_model_and_context(
            config.model, output_dir, allow_unknown_keys=bool(eval_args.get("allow_unknown_keys"))
        )
    results = run_segmentation_with_dinov3(backbone, config)
    write_results(results, output_dir, RESULTS_FILENAME)
    return results


def run_segmentation_with_dinov3(backbone: nn.Module | None, config: SegmentationConfig) -> dict[str, float]:
    """Evaluate if `load_from` is set, else train; returns the metrics in percent.

    Args:
        backbone: the frozen backbone; may be None for `load_from=dinov3_vit7b16_ms`.
        config: what to do.

    Raises:
        ValueError: no backbone where one is needed.
    """
    if config.load_from is not None:
        return test_segmentation(backbone, config)
    if backbone is None:
        raise ValueError(
            "a head is trained on a backbone: give one with model.dino_hub=<name>, or model.config_file=<YAML> and "
            f"model.pretrained_weights=<file>; without one only load_from={HUB_DECODER} works"
        )
    return train_segmentation(backbone, config)


if __name__ == "__main__":
    sys.exit(main())
