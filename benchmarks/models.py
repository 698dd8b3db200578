"""The same backbones from this package, timm and transformers, with random weights, as functions to be measured."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import hubconf
from benchmarks.frame.measure import Call, Maker

PRODUCTS = (
    "aten::addmm",
    "aten::mm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::mkldnn_convolution",
    "aten::cudnn_convolution",
)
ATTENTION = "scaled_dot_product"


class Entry(NamedTuple):
    """One backbone: its names here and in timm, and its configuration in transformers."""

    hub: str
    timm: str
    config: dict[str, Any]


def _vit(size: str, width: int, depth: int, heads: int) -> Entry:
    config = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_register_tokens": 4,
        "attn_implementation": "sdpa",
    }
    return Entry(f"dinov3_vit{size[0]}16", f"vit_{size}_patch16_dinov3", config)


def _convnext(size: str, depths: list[int], width: int) -> Entry:
    config = {"depths": depths, "hidden_sizes": [width * 2**i for i in range(4)]}
    return Entry(f"dinov3_convnext_{size}", f"convnext_{size}", config)


MODELS = {
    "ViT-S": _vit("small", 384, 12, 6),
    "ViT-B": _vit("base", 768, 12, 12),
    "ViT-L": _vit("large", 1024, 24, 16),
    "ConvNeXt-T": _convnext("tiny", [3, 3, 9, 3], 96),
    "ConvNeXt-L": _convnext("large", [3, 3, 27, 3], 192),
}


def build(library: str, name: str) -> nn.Module:
    """The backbone `name` of `MODELS`, in evaluation mode; "ours", "timm" or "transformers"."""
    entry = MODELS[name]
    if library == "ours":
        return getattr(hubconf, entry.hub)(pretrained=False).eval()
    if library == "timm":
        import timm

        options: dict[str, Any] = {} if "convnext" in entry.timm else {"dynamic_img_size": True}
        return timm.create_model(entry.timm, num_classes=0, **options).eval()
    import transformers

    kind = "ConvNext" if "convnext" in entry.timm else "ViT"
    config = getattr(transformers, f"DINOv3{kind}Config")(**entry.config)
    return getattr(transformers, f"DINOv3{kind}Model")(config).eval()


def make_forward(
    library: str,
    name: str,
    side: int,
    batch: int,
    device: torch.device,
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Call:
    """A function that takes features of one batch of square images, as a user does."""
    model = build(library, name).to(device, dtype)
    images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    run: Callable[[Tensor], Any] = torch.compile(model) if compiled else model

    def forward() -> Any:
        with torch.inference_mode():
            return run(images)

    return forward


def forward_makers(*args: Any, **options: Any) -> dict[str, Maker]:
    """`make_forward` of ours, timm and transformers."""
    return {library: partial(make_forward, library, *args, **options) for library in ("ours", "timm", "transformers")}


def product_share(call: Call) -> float:
    """Part of the operators' time that goes to matrix products: linear layers, convolutions with groups of many
    channels, and attention. A depth-wise convolution is none.
    """
    call()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        call()
    total = products = 0.0
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.device_type != DeviceType.CPU:
            continue
        total += event.self_cpu_time_total
        if ATTENTION in event.key or (event.key in PRODUCTS and not _is_depth_wise(event)):
            products += event.self_cpu_time_total
    return products / total


def _is_depth_wise(event: Any) -> bool:
    shapes = event.input_shapes
    return "convolution" in event.key and len(shapes) > 1 and len(shapes[1]) == 4 and shapes[1][1] == 1
