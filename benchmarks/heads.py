"""Mask2Former on sliding windows, and the detector at 1536 pixels, beside the equations as they stand.

The alternative has the same weights and the same layers, computed eagerly without regard to speed: attention holds its
matrix (`softmax(q k^T / sqrt(d) + bias) v`), rotary positions are `x cos + rot(x) sin`, deformable attention is a loop
over levels, windows go through the backbone one by one, and the bias by boxes is held for all queries at once. Both
must agree. The backbone is narrow: the heads are measured.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.deformable_attention import loop_over_levels
from benchmarks.frame.bench import Bench
from benchmarks.frame.measure import Call
from dinov3.eval.detection.config import DetectionHeadConfig
from dinov3.eval.detection.models import global_rpe_decomp_decoder, windows
from dinov3.eval.detection.models.detr import build_model
from dinov3.eval.segmentation.inference import make_inference
from dinov3.eval.segmentation.models import build_segmentation_decoder
from dinov3.eval.segmentation.models.utils import ms_deform_attn
from dinov3.layers import attention, linear
from dinov3.models.vision_transformer import DinoVisionTransformer

TABLE = "task heads"
TARGET = 1.2


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """Attention as its equation stands, without a causal mask."""
    assert not is_causal, "the heads have none"
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    return F.dropout(torch.softmax(logits, dim=-1), dropout_p) @ value


def plain_rotation(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions as their equation stands."""
    sin, cos = tables
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def plain_deformable(value: Tensor, sizes: Any, locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable attention level by level."""
    return loop_over_levels(value, [(int(h), int(w)) for h, w in sizes], locations, weights)


@contextmanager
def as_the_equations_stand() -> Iterator[None]:
    """While this is open, layers compute the plain way."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", plain_attention))
        stack.enter_context(patch.object(attention, "rotate", plain_rotation))
        stack.enter_context(patch.object(linear, "_HAS_ONEDNN", False))
        stack.enter_context(patch.object(ms_deform_attn, "ms_deform_attn_core_pytorch", plain_deformable))
        yield


def make_call(predict: Callable[[], Tensor], plain: bool) -> Call:
    """The prediction, ours or the plain way."""

    def call() -> Tensor:
        with torch.inference_mode():
            if not plain:
                return predict()
            with as_the_equations_stand():
                return predict()

    return call


def small_vit() -> nn.Module:
    """192 wide, 4 blocks."""
    vit = DinoVisionTransformer(embed_dim=192, depth=4, num_heads=3, patch_size=16, n_storage_tokens=4)
    vit.init_weights()
    return vit.eval()


def make_segmenter(side: int, crop: int, device: torch.device) -> Callable[[], Tensor]:
    """Class map of one image in windows of which two thirds are new."""
    torch.manual_seed(0)
    decoder = build_segmentation_decoder(small_vit(), decoder_type="m2f", hidden_dim=256).to(device).eval()
    images = torch.randn(1, 3, side, side, device=device)
    size, step = (crop, crop), (crop * 2 // 3,) * 2
    return partial(make_inference, images, decoder, "slide", "m2f", (side, side), 150, crop_size=size, stride=step)


def make_detector(side: int, device: torch.device, plain: bool) -> Callable[[], Tensor]:
    """Boxes and logits of one image."""
    torch.manual_seed(0)
    config = DetectionHeadConfig(
        hidden_dim=128,
        nheads=4,
        dim_feedforward=512,
        num_encoder_layers=1,
        num_queries_one2one=300,
        num_queries_one2many=0,
        n_windows_sqrt=3,
        proposal_feature_levels=4,
    )
    detector = build_model(small_vit(), config).to(device).eval()
    if plain:
        for module in detector.modules():
            if isinstance(module, windows.WindowsWrapper):
                module.max_pixels = 1
            if isinstance(module, global_rpe_decomp_decoder.GlobalCrossAttention):
                module.max_bias_numbers = 2**62
    images = [torch.randn(3, side, side, device=device)]

    def predict() -> Tensor:
        found = detector(images)
        return torch.cat([found["pred_logits"], found["pred_boxes"]], dim=-1)

    return predict


def run(bench: Bench) -> None:
    """Both heads."""
    side, crop = (256, 128) if bench.quick else (768, 512)
    segment = f"Mask2Former, windows of {crop} over {side} px"
    detect_side = 512 if bench.quick else 1536
    detect = f"detector, {detect_side} px"
    makers: dict[str, Callable[[bool], Callable[[], Tensor]]] = {
        segment: lambda plain: make_segmenter(side, crop, bench.device),
        detect: lambda plain: make_detector(detect_side, bench.device, plain),
    }
    for name, make in makers.items():
        if not bench.wants(name):
            continue
        ours, theirs = (make_call(make(plain), plain) for plain in (False, True))
        torch.testing.assert_close(ours(), theirs(), rtol=1e-2, atol=1e-2)
        sides: dict[str, Callable[[], Call]] = {
            "ours": partial(_same, ours),
            "as the equations stand": partial(_same, theirs),
        }
        bench.time(name, sides, table=TABLE, target=TARGET)


def _same(call: Call) -> Call:
    return call
