"""Parameters and floating-point operations of the hub's backbones: the table of MODEL_CARD.md.

    python -m benchmarks model_card

Operations are those of matrix products and convolutions for one image, a multiply-add counted as two, as fvcore counts
them in the traced forward pass. Vision transformers are traced with one and two blocks: all blocks are alike.
"""

import math
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape

from benchmarks.frame.bench import Bench
from dinov3.hub.backbones import Weights
from dinov3.hub.loading import load_backbone
from dinov3.hub.registry import BACKBONES
from dinov3.utils import count_parameters

SIDES = (256, 512)  # pixels
PUBLISHED = {
    "dinov3_vits16": "21M",
    "dinov3_vits16plus": "29M",
    "dinov3_vitb16": "86M",
    "dinov3_vitl16": "300M",
    "dinov3_vith16plus": "840M",
    "dinov3_vit7b16": "6,716M",
    "dinov3_convnext_tiny": "29M",
    "dinov3_convnext_small": "50M",
    "dinov3_convnext_base": "89M",
    "dinov3_convnext_large": "198M",
}
_COUNTED = ("conv", "linear", "matmul", "scaled_dot_product_attention")


def parameters(name: str, weights: Weights = Weights.LVD1689M) -> int:
    """Number of parameters."""
    return count_parameters(load_backbone(name, pretrained=False, weights=weights, device="meta"))


def gflops(name: str, side: int) -> float:
    """10^9 operations of the forward pass of one square image."""
    if name.startswith("dinov3_convnext"):
        return _gflops(name, side)
    depth: int = load_backbone(name, pretrained=False, device="meta").n_blocks  # type: ignore[assignment]
    one, two = _gflops(name, side, depth=1), _gflops(name, side, depth=2)
    return one + (depth - 1) * (two - one)


def _gflops(name: str, side: int, **options: Any) -> float:
    model = load_backbone(name, pretrained=False, **options).eval()
    with torch.inference_mode():
        analysis = FlopCountAnalysis(model, torch.zeros(1, 3, side, side))
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        return float(2 * sum(count for kind, count in analysis.by_operator().items() if kind in _COUNTED) / 1e9)


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of q·k and of the weighted sum of v."""
    q, k, v = (get_shape(value) for value in inputs[:3])
    return math.prod(q) * k[-2] + math.prod(q[:-1]) * k[-2] * v[-1]


def table() -> str:
    """All backbones in Markdown."""
    columns = ["model", "parameters", "published", *(f"GFLOPs at {side} px" for side in SIDES)]
    rows = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for name in BACKBONES:
        counted = [f"{gflops(name, side):,.1f}" for side in SIDES]
        rows.append([f"`{name}`", f"{parameters(name):,}", PUBLISHED.get(name, "–"), *counted])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def run(_: Bench) -> None:
    """Print the table: it belongs to MODEL_CARD.md and is counted, not measured."""
    print(table())
