"""Images per second of our backbones beside timm's of the same architecture, on this machine, as a Markdown table.

    python -m benchmarks.backbones [--seconds 5] [--batch 8] [--size 224]

Both get the same random input in float32, one after the other within each round, so that a change of the machine's load
meets both. Reported is the best round: what the machine can do when nothing disturbs it.
"""

import argparse
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

import hubconf
from dinov3.utils.device import default_device

PAIRS = {
    "ViT-S/16": ("dinov3_vits16", "vit_small_patch16_dinov3_qkvb"),
    "ViT-B/16": ("dinov3_vitb16", "vit_base_patch16_dinov3_qkvb"),
    "ConvNeXt-T": ("dinov3_convnext_tiny", "convnext_tiny"),
}


def forward(model: nn.Module, images: Tensor) -> None:
    """Features of one batch, as a user takes them."""
    with torch.inference_mode():
        model(images)


def train_step(model: nn.Module, images: Tensor) -> None:
    """Forward and backward of one batch."""
    model(images).float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def images_per_s(step: Callable[[nn.Module, Tensor], None], model: nn.Module, images: Tensor, seconds: float) -> float:
    """Rate over at least `seconds`, after one step that doesn't count."""
    step(model, images)
    _wait_for(images.device)
    n_steps, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or n_steps < 2:
        step(model, images)
        _wait_for(images.device)
        n_steps += 1
    return n_steps * images.shape[0] / elapsed


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    args = parser.parse_args()

    device = default_device()
    images = torch.randn(args.batch, 3, args.size, args.size, device=device)
    print(f"torch {torch.__version__}, timm {timm.__version__}, {device}, {torch.get_num_threads()} threads, float32,")
    print(f"batch {args.batch}, {args.size} px; images/s, best of {args.rounds} rounds of {args.seconds:g} s\n")
    print("| model | what | dinov3 | timm | ratio |\n|---|---|---|---|---|")
    for name, (ours, theirs) in PAIRS.items():
        models = [getattr(hubconf, ours)(pretrained=False), timm.create_model(theirs, num_classes=0)]
        for step, training in ((forward, False), (train_step, True)):
            for model in models:
                model.to(device).train(training)
            rounds = [[images_per_s(step, m, images, args.seconds) for m in models] for _ in range(args.rounds)]
            best = [max(column) for column in zip(*rounds, strict=True)]
            print(f"| {name} | {step.__name__} | {best[0]:.1f} | {best[1]:.1f} | {best[0] / best[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
