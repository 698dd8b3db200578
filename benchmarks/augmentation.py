"""Images per second and core of the multi-crop augmentation, beside a pipeline in plain torchvision transforms on PIL.

2 crops of 224 px and 8 of 96 px from one JPEG, decoding included, one thread. Measured is the processor time of this
process, one image each in turn, so that a change of the machine's load meets all alike. The path `device` does the
distortions in batches: what its workers do before that counts for one core, the rest is a row of its own.
"""

import time
from collections.abc import Callable
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import v2

from benchmarks.frame.bench import Bench
from benchmarks.frame.measure import synchronize
from dinov3.data import DataAugmentationDINO, MaskingGenerator, collate_data_and_cast
from dinov3.data.datasets.decoders import EncodedImage
from dinov3.data.device_augmentation import DeviceAugmentation

TABLE = "multi-crop data pipeline"
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


def device_rates(data: bytes, rounds: int, device: torch.device, batch_size: int) -> tuple[list[float], list[float]]:
    """Images/s and core of what workers do, and images/s of the batched distortions, in each round."""
    augment = DataAugmentationDINO(**CROPS, augmentation="device")
    finish = DeviceAugmentation(augment, device=device, dtype=torch.float32)
    before, after = [], []
    for _ in range(rounds):
        start = time.process_time()
        samples = [(augment(EncodedImage(data)), ()) for _ in range(batch_size)]
        before.append(batch_size / (time.process_time() - start))
        batch = collate_data_and_cast(
            samples, (0.1, 0.5), 0.5, torch.float32, mask_generator=MaskingGenerator((14, 14))
        )
        start = time.perf_counter()
        finish(batch)
        synchronize(device)
        after.append(batch_size / (time.perf_counter() - start))
    return before, after


def run(bench: Bench) -> None:
    """The paths `tensor` and `pil`, and the two halves of `device`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = photograph(500, 375)
    plain = plain_pipeline()
    pil, tensor = (DataAugmentationDINO(**CROPS, augmentation=path) for path in ("pil", "tensor"))
    paths = {"tensor": lambda: tensor(EncodedImage(data)), "pil": lambda: pil(EncodedImage(data).decode())}
    for path, ours in paths.items():
        bench.time(
            f"augmentation, {path}, per core",
            {
                "ours": lambda ours=ours: ours,  # type: ignore[misc]
                "torchvision on PIL": lambda: lambda: plain(Image.open(BytesIO(data)).convert("RGB")),
            },
            table=TABLE,
            target=2.0 if path == "tensor" else None,
            items=1,
            rounds=(20, 200),
            before=torch.manual_seed,
            clock=time.process_time,
        )
    names = ("augmentation, device: workers, per core", "augmentation, device: batched distortions")
    if any(bench.wants(name) for name in names):
        for name, rates in zip(names, device_rates(data, 3, bench.device, 8 if bench.quick else 32), strict=True):
            bench.record(name, {"ours": rates}, table=TABLE, unit="images/s")
    torch.set_num_threads(threads)
