"""A step of self-supervised training against its floor, and against the equations run eagerly as they stand.

ViT-S with 16 images and ViT-L with 2, as the recipes have them: 2 global crops of 224 px, 8 local ones of 96 px, 65,536
prototypes, iBOT masks, KoLeo, stochastic depth, clipping, AdamW and EMA, in float32 on random pixels. The floor is what
the step's matrix products (counted by torch's `FlopCounterMode`, which on a CPU leaves out attention) take at the rate
of the first product of a feed-forward network of the same size, which takes its turn in every round.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.frame.bench import Bench
from benchmarks.frame.measure import Call, time_in_turns
from benchmarks.reference_training import ReferenceTraining
from dinov3.configs import get_default_config
from dinov3.data.collate import collate_data_and_cast
from dinov3.data.masking import MaskingGenerator
from dinov3.train.optimizer import build_optimizer, clip_gradients
from dinov3.train.ssl_meta_arch import SSLMetaArch

TABLE = "Training step"
TEMPERATURE, MOMENTUM, SEED = 0.07, 0.992, 0


class Point(NamedTuple):
    """A recipe: `arch` of the configuration and its sizes, images per batch."""

    label: str
    arch: str
    dim: int
    depth: int
    n_heads: int
    batch: int


POINTS = (Point("ViT-S", "vit_small", 384, 12, 6, 16), Point("ViT-L", "vit_large", 1024, 24, 16, 2))


def make_config(point: Point) -> Any:
    """The defaults, which are the ViT-L recipe, in float32."""
    changes = {
        "student": {"arch": point.arch},
        "train": {"batch_size_per_gpu": point.batch, "compile": False},
        "compute_precision": {"param_dtype": "fp32"},
    }
    return OmegaConf.merge(get_default_config(), changes)


def make_batch(cfg: Any) -> dict[str, Any]:
    """Random pixels with iBOT's masks, always the same."""
    crops, options, generator = cfg.crops, cfg.ibot, torch.Generator().manual_seed(SEED)
    samples = [
        (
            {
                f"{kind}_crops": [torch.randn(3, size, size, generator=generator) for _ in range(number)]
                for kind, size, number in (
                    ("global", crops.global_crops_size, 2),
                    ("local", crops.local_crops_size, crops.local_crops_number),
                )
            },
            (),
        )
        for _ in range(cfg.train.batch_size_per_gpu)
    ]
    side = crops.global_crops_size // cfg.student.patch_size
    return collate_data_and_cast(
        samples,
        tuple(options.mask_ratio_min_max),
        options.mask_sample_probability,
        torch.float32,
        mask_generator=MaskingGenerator((side, side), max_num_patches=side * side // 2),
        python_rng=random.Random(SEED),
        numpy_rng=np.random.RandomState(SEED),
    )


def our_step(point: Point) -> Call:
    """One iteration as `dinov3.train.loop` does it."""
    cfg = make_config(point)
    torch.manual_seed(SEED)
    with torch.device("meta"):
        model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    model.init_weights()
    model.train()
    optimizer, batch = build_optimizer(cfg, model.get_params_groups()), make_batch(cfg)

    def step() -> None:
        torch.manual_seed(SEED)  # the same samples skip branches
        optimizer.zero_grad(set_to_none=True)
        model.forward_backward(batch, teacher_temp=TEMPERATURE)
        clip_gradients(model.student, cfg.optim.clip_grad)
        optimizer.step()
        model.update_ema(MOMENTUM)

    return step


def reference_step(point: Point) -> Call:
    """One iteration of the equations as they stand."""
    cfg = make_config(point)
    torch.manual_seed(SEED)
    model = ReferenceTraining(cfg, (point.dim, point.depth, point.n_heads))
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.02)
    for network in (model.student, model.teacher):
        network["backbone"].reset_periods()  # type: ignore[operator]
    model.train()
    optimizer, batch = model.build_optimizer(), make_batch(cfg)

    def step() -> None:
        torch.manual_seed(SEED)
        model.step(batch, optimizer, TEMPERATURE, MOMENTUM)

    return step


def matching_product(point: Point) -> tuple[Call, float]:
    """A feed-forward network's first product over all student tokens, for a second or so; and its operations."""
    n_tokens = point.batch * (2 * 197 + 8 * 37)
    x, weight = torch.randn(n_tokens, point.dim), torch.randn(4 * point.dim, point.dim)
    flops = 2 * n_tokens * point.dim * 4 * point.dim
    repeats = max(1, round(2e11 / flops))

    def products() -> None:
        for _ in range(repeats):
            F.linear(x, weight)

    return products, flops * repeats


def count_flops(step: Call) -> float:
    """Operations of the matrix products of a step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def measure_step(bench: Bench, point: Point) -> None:
    """Time of a step against the reference's and against the floor, in the same rounds."""
    name = f"{point.label}, {point.batch} images"
    if not bench.wants(f"{name}, time") and not bench.wants(f"{name}, floor"):
        return
    ours = our_step(point)
    flops = count_flops(ours)
    product, product_flops = matching_product(point)
    calls = {"ours": ours, "reference": reference_step(point), "product": product}
    times = time_in_turns(calls, device=bench.device, seconds=bench.seconds, rounds=(1, 1) if bench.quick else (3, 5))
    floors = [1e3 * flops / product_flops * t for t in times["product"]]
    values = {label: [1e3 * t for t in times[label]] for label in ("ours", "reference")}
    bench.record(f"{name}, time", values, table=TABLE, unit="ms", target=1.3)
    bench.record(f"{name}, floor", {"ours": values["ours"], "floor": floors}, table=TABLE, unit="ms", target=0.8)


def run(bench: Bench) -> None:
    """Both recipes: time, floor, memory."""
    makers: dict[str, Callable[[Point], Call]] = {"ours": our_step, "reference": reference_step}
    for point in POINTS:
        measure_step(bench, point)
        bench.memory(
            f"{point.label}, {point.batch} images, memory",
            {label: partial(maker, point) for label, maker in makers.items()},
            table=TABLE,
            target=1 / 0.6,
        )
