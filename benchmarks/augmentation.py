"""Images per second and core of the multi-crop augmentation, as a Markdown table.

    python -m benchmarks.augmentation [--rounds 40] [--width 500] [--height 375] [--device]

Compared are our paths `pil` and `tensor` with a pipeline written out in plain torchvision transforms on PIL images: 2
crops of 224 px and 8 of 96 px from one JPEG, decoding included, one thread. Measured is the processor time of this
process, one image each in turn, so that a change of the machine's load meets all alike; reported is the median.

With `--device`, also batches of 32 images whose distortions are left to the default device.
"""

import argparse
import time
from collections.abc import Callable
from io import BytesIO
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from PIL import __version__ as pillow_version
from torchvision.transforms import v2

from dinov3.data import DataAugmentationDINO, MaskingGenerator, collate_data_and_cast
from dinov3.data.datasets.decoders import EncodedImage
from dinov3.data.device_augmentation import DeviceAugmentation
from dinov3.utils.device import default_device

CROPS: dict[str, Any] = {
    "global_crops_scale": (0.32, 1.0),
    "local_crops_scale": (0.05, 0.32),
    "local_crops_number": 8,
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photograph(width: int, height: int) -> bytes:
    """A JPEG of that size of a photograph that comes with scikit-learn."""
    from sklearn.datasets import load_sample_images

    image = Image.fromarray(load_sample_images().images[0]).resize((width, height), Image.Resampling.BICUBIC)
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def plain_pipeline() -> Callable[[Image.Image], list[torch.Tensor]]:
    """The multi-crop augmentation in torchvision's own words."""

    def chain(size: int, scale: tuple[float, float], *, blur: float, solarize: float) -> v2.Compose:
        colour = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([colour], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=blur),
                v2.RandomSolarize(128, p=solarize),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    chains = [
        chain(224, CROPS["global_crops_scale"], blur=0.0, solarize=0.0),
        chain(224, CROPS["global_crops_scale"], blur=0.9, solarize=0.2),
        *[chain(96, CROPS["local_crops_scale"], blur=0.5, solarize=0.0)] * CROPS["local_crops_number"],
    ]
    return lambda image: [chain(image) for chain in chains]


def measure(paths: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of processor time of each, taken in turn on equal random numbers."""
    times: dict[str, list[float]] = {name: [] for name in paths}
    for seed in range(-2, rounds):
        for name, run in paths.items():
            torch.manual_seed(seed + 2)
            start = time.process_time()
            run()
            if seed >= 0:
                times[name].append(time.process_time() - start)
    return {name: median(values) for name, values in times.items()}


def device_rate(data: bytes, rounds: int, batch_size: int = 32) -> tuple[float, float]:
    """Images/s of the batched distortions, and images/s and core of what workers do before that."""
    augment = DataAugmentationDINO(**CROPS, augmentation="device")
    finish = DeviceAugmentation(augment, device=default_device(), dtype=torch.float32)
    before, after = [], []
    for _ in range(rounds):
        start = time.process_time()
        samples = [(augment(EncodedImage(data)), ()) for _ in range(batch_size)]
        before.append(time.process_time() - start)
        batch = collate_data_and_cast(
            samples, (0.1, 0.5), 0.5, torch.float32, mask_generator=MaskingGenerator((14, 14))
        )
        start = time.perf_counter()
        finish(batch)
        if finish.device.type != "cpu":
            torch.accelerator.synchronize()
        after.append(time.perf_counter() - start)
    return batch_size / median(after), batch_size / median(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--width", type=int, default=500, help="of the JPEG in pixels")
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--device", action="store_true", help="also the path `device`")
    args = parser.parse_args()

    torch.set_num_threads(1)
    data = photograph(args.width, args.height)
    plain = plain_pipeline()
    pil, tensor = (DataAugmentationDINO(**CROPS, augmentation=path) for path in ("pil", "tensor"))
    seconds = measure(
        {
            "plain torchvision on PIL": lambda: plain(Image.open(BytesIO(data)).convert("RGB")),
            "pil": lambda: pil(EncodedImage(data).decode()),
            "tensor": lambda: tensor(EncodedImage(data)),
        },
        args.rounds,
    )
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {pillow_version}, ", end="")
    print(f"NumPy {np.__version__}; {args.width} x {args.height} JPEG, median of {args.rounds} images\n")
    print("| path | images/s per core | ratio |\n|---|---|---|")
    slowest = seconds["plain torchvision on PIL"]
    for name, value in seconds.items():
        print(f"| {name} | {1 / value:.1f} | {slowest / value:.2f} |")
    if args.device:
        finished, prepared = device_rate(data, max(args.rounds // 10, 3))
        print(
            f"\ndevice ({default_device()}): workers {prepared:.1f} images/s per core, device {finished:.1f} images/s"
        )


if __name__ == "__main__":
    main()
