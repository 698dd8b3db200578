"""The paths `tensor` and `device` against `pil`: same draws, nearly the same pixels, same distributions."""

from io import BytesIO
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov3.data import DataAugmentationDINO, MaskingGenerator, collate_data_and_cast, make_data_loader
from dinov3.data.datasets import ImageFolder
from dinov3.data.datasets.decoders import EncodedImage
from dinov3.data.device_augmentation import DeviceAugmentation, DeviceAugmentedLoader
from dinov3.data.draws import draw_distortion
from tests.helpers.images import write_image_folder

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.2, 0.3)


def make(augmentation: str, **changes: Any) -> DataAugmentationDINO:
    options: dict[str, Any] = {
        "global_crops_scale": (0.32, 1.0),
        "local_crops_scale": (0.05, 0.32),
        "local_crops_number": 4,
        "global_crops_size": 48,
        "local_crops_size": 24,
        "mean": MEAN,
        "std": STD,
    }
    return DataAugmentationDINO(**(options | changes), augmentation=augmentation)


def photo(width: int = 120, height: int = 90) -> Image.Image:
    """Smooth shades with edges and a little noise, like a photograph."""
    rows, columns = np.mgrid[:height, :width] / height
    channels = [np.sin(5 * rows + 2), np.cos(4 * columns), np.sin(3 * rows * columns + 1)]
    shades = 127 + 90 * np.stack(channels, axis=-1)
    shades[height // 3 : height // 2, width // 4 : width // 2] = (30, 60, 220)
    noise = np.random.default_rng(0).normal(0, 4, shades.shape)
    return Image.fromarray((shades + noise).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def levels(crop: Tensor) -> Tensor:
    """Grey levels of a normalised crop."""
    return (crop * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255


def on_the_same_draws(augment: DataAugmentationDINO, image: Any, seed: int) -> tuple[dict[str, Any], Tensor]:
    """Crops, and the next number that torch and NumPy would draw."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    return augment(image), torch.cat([torch.rand(1), torch.tensor([np.random.rand()])])


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gram": {"gram_teacher_crops_size": 64},
    "small gram": {"gram_teacher_crops_size": 32},
    "clean gram": {"gram_teacher_crops_size": 64, "gram_teacher_no_distortions": True},
    "shared": {"share_color_jitter": True},
    "subset": {"local_crops_subset_of_global_crops": True, "patch_size": 4},
    "subset, gram": {"local_crops_subset_of_global_crops": True, "patch_size": 4, "gram_teacher_crops_size": 64},
    "teacher": {"teacher_no_color_jitter": True},
    "no flips": {"horizontal_flips": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_tensor_crops_are_those_of_pil(mode: str) -> None:
    data = jpeg(photo())
    pil, tensor = make("pil", **MODES[mode]), make("tensor", **MODES[mode])
    means = []
    for seed in range(8):
        expected, next_draws = on_the_same_draws(pil, EncodedImage(data).decode(), seed)
        output, next_tensor_draws = on_the_same_draws(tensor, EncodedImage(data), seed)
        assert torch.equal(next_draws, next_tensor_draws)
        assert list(output) == list(expected)
        assert output["offsets"] == expected["offsets"]
        for key in ("global_crops", "global_crops_teacher", "gram_teacher_crops", "local_crops"):
            for ours, theirs in zip(output.get(key, []), expected.get(key, []), strict=True):
                assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
                means.append((levels(ours) - levels(theirs)).abs().mean())
    # A level of resampling may pass the threshold of solarization, or grow by contrast: the average counts.
    assert max(means) < 3
    assert sum(means) / len(means) < 0.5


@pytest.mark.parametrize("flips", [True, False])
def test_geometry_and_flip_agree_to_two_levels(flips: bool) -> None:
    options = {"teacher_no_color_jitter": True, "horizontal_flips": flips}
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (100, 140, 3), dtype=np.uint8))
    for image in (photo(), noise):
        for seed in range(10):
            ours, _ = on_the_same_draws(make("tensor", **options), image, seed)
            theirs, _ = on_the_same_draws(make("pil", **options), image, seed)
            for a, b in zip(ours["global_crops_teacher"], theirs["global_crops_teacher"], strict=True):
                assert (levels(a) - levels(b)).abs().max() < 2.01


def test_large_jpegs_are_decoded_at_reduced_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    data = jpeg(photo(1600, 1200))
    reductions = []
    decode = EncodedImage.decode

    def spy(self: EncodedImage, reduce: int = 1) -> Image.Image:
        image = decode(self, reduce)
        reductions.append((reduce, image.size))
        return image

    monkeypatch.setattr(EncodedImage, "decode", spy)
    for seed in range(4):
        ours, _ = on_the_same_draws(make("tensor", teacher_no_color_jitter=True), EncodedImage(data), seed)
        theirs, _ = on_the_same_draws(make("pil", teacher_no_color_jitter=True), Image.open(BytesIO(data)), seed)
        for a, b in zip(ours["global_crops_teacher"], theirs["global_crops_teacher"], strict=True):
            assert (levels(a) - levels(b)).abs().mean() < 2
    assert all(reduce > 1 and size == (1600 // reduce, 1200 // reduce) for reduce, size in reductions)


def test_no_crop_is_taken_from_too_few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    augment = make("tensor", local_crops_scale=(0.2, 0.2))
    resized: list[tuple[int, ...]] = []
    cut = augment._tensors._cut  # type: ignore[union-attr]

    def spy(pixels: Tensor, geometry: Any, size: int, scale: tuple[float, float]) -> Tensor:
        resized.append((round(geometry.height * scale[0]), round(geometry.width * scale[1]), size))
        return cut(pixels, geometry, size, scale)

    monkeypatch.setattr(augment._tensors, "_cut", spy)
    for width in (200, 400, 800):
        resized.clear()
        augment(EncodedImage(jpeg(photo(width, width * 3 // 4))))
        full = [(h, w) for h, w, size in resized if min(h, w) >= 2 * size - 1]
        assert width < 400 or len(full) == len(resized)


def test_upright_photographs_are_cut_as_they_are_seen() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    data = jpeg(photo(800, 600), exif=turned)
    encoded = EncodedImage(data, upright=True)
    assert encoded.size() == (600, 800)
    assert encoded.decode(4).size == (150, 200)
    ours, _ = on_the_same_draws(make("tensor", teacher_no_color_jitter=True), encoded, 0)
    theirs, _ = on_the_same_draws(make("pil", teacher_no_color_jitter=True), encoded.decode(), 0)
    for a, b in zip(ours["global_crops_teacher"], theirs["global_crops_teacher"], strict=True):
        assert (levels(a) - levels(b)).abs().mean() < 2


@pytest.mark.parametrize("mode", ["plain", "gram", "clean gram", "shared"])
def test_device_batches_are_those_of_tensor(mode: str) -> None:
    images = [photo(), photo(90, 120)]
    collate = {"mask_ratio_tuple": (0.1, 0.5), "mask_probability": 0.5, "mask_generator": MaskingGenerator((4, 4))}
    batches = []
    for path in ("tensor", "device"):
        augment = make(path, **MODES[mode])
        samples = [(on_the_same_draws(augment, image, seed)[0], ()) for seed, image in enumerate(images)]
        batch = collate_data_and_cast(samples, dtype=torch.float32, **collate)
        if path == "device":
            assert batch["collated_global_crops"].dtype == torch.uint8
            batch = DeviceAugmentation(augment, device=torch.device("cpu"), dtype=torch.float32)(batch)
        batches.append(batch)
    assert set(batches[0]) == set(batches[1])
    for key in (key for key in batches[0] if key.endswith("crops")):
        assert batches[0][key].shape == batches[1][key].shape
        difference = (levels(batches[0][key]) - levels(batches[1][key])).abs()
        assert difference.mean() < 0.1


@pytest.mark.parametrize("workers", [0, 2])
def test_device_batches_do_not_depend_on_the_workers(tmp_path: Any, workers: int) -> None:
    write_image_folder(tmp_path, size=60)
    augment = make("device")

    def batches(num_workers: int) -> list[dict[str, Any]]:
        loader = make_data_loader(
            dataset=ImageFolder(root=tmp_path, transform=augment),
            batch_size=3,
            num_workers=num_workers,
            collate_fn=Collate(),
            draw_seed=5,
        )
        device = DeviceAugmentation(augment, device=torch.device("cpu"), dtype=torch.bfloat16)
        finished = DeviceAugmentedLoader(loader, device)
        assert finished.batch_size == 3
        iterator = iter(finished)
        return [next(iterator) for _ in range(2)]

    for one, other in zip(batches(0), batches(workers), strict=True):
        assert one["collated_local_crops"].dtype == torch.bfloat16
        assert torch.equal(one["collated_local_crops"], other["collated_local_crops"])
        assert torch.equal(one["collated_masks"], other["collated_masks"])


class Collate:
    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        return collate_data_and_cast(samples, (0.1, 0.5), 0.5, torch.float32, mask_generator=MaskingGenerator((4, 4)))


def test_distributions_are_equal_on_independent_draws() -> None:
    """Mean, contrast, colourfulness and sharpness of crops: Kolmogorov-Smirnov distances at the 0.1 % level."""
    n = 200
    image = photo()
    statistics: dict[str, Tensor] = {}  # [3, n, 4]: global 1, global 2, local
    for offset, path in enumerate(("pil", "tensor", "device")):
        augment = make(path, local_crops_number=1)
        samples = [(on_the_same_draws(augment, image, 10_000 * (offset + 1) + seed)[0], ()) for seed in range(n)]
        batch = Collate()(samples)
        if path == "device":
            batch = DeviceAugmentation(augment, device=torch.device("cpu"), dtype=torch.float32)(batch)
        crops = [*batch["collated_global_crops"].chunk(2), batch["collated_local_crops"]]
        statistics[path] = torch.stack([torch.stack([_describe(levels(crop)) for crop in kind]) for kind in crops])
    critical = 1.95 * (2 / n) ** 0.5
    for path in ("tensor", "device"):
        for kind, column in product(range(3), range(4)):
            a, b = (statistics[name][kind, :, column] for name in ("pil", path))
            assert _ks_distance(a, b) < critical, (path, kind, column)


def _describe(crop: Tensor) -> Tensor:
    edges = (crop[:, :, 1:] - crop[:, :, :-1]).abs().mean()
    return torch.stack([crop.mean(), crop.std(), (crop[0] - crop[2]).mean(), edges]).round(decimals=2)


def _ks_distance(a: Tensor, b: Tensor) -> Tensor:
    points = torch.cat([a, b]).sort().values
    below = [torch.searchsorted(x.sort().values, points, right=True) / len(x) for x in (a, b)]
    return (below[0] - below[1]).abs().max()


def test_rates_of_the_distortions_are_those_of_the_definition() -> None:
    augment = make("tensor")
    n = 1500
    for chain, blur, solarize in (
        (augment.global_transfo1, 0.0, 0.0),
        (augment.global_transfo2, 0.9, 0.2),
        (augment.local_transfo, 0.5, 0.0),
    ):
        drawn = [draw_distortion(chain) for _ in range(n)]
        rates = [
            sum(bool(d.jitter) for d in drawn),
            sum(d.grayscale for d in drawn),
            sum(d.blur_sigma > 0 for d in drawn),
            sum(d.solarize for d in drawn),
        ]
        for count, p in zip(rates, (0.8, 0.2, blur, solarize), strict=True):
            assert abs(count - n * p) <= 4 * (n * p * (1 - p)) ** 0.5


def test_images_of_many_channels_and_bits() -> None:
    fine = torch.rand(5, 70, 90)
    augment = make("tensor", mean=[0.5] * 5, std=[0.25] * 5, gram_teacher_crops_size=64)
    output = augment(fine)
    assert [tuple(crop.shape) for crop in output["global_crops"]] == [(5, 48, 48)] * 2
    assert [tuple(crop.shape) for crop in output["local_crops"]] == [(5, 24, 24)] * 4
    crop = output["local_crops"][0] * 0.25 * 255 + 127.5
    assert (crop - crop.round()).abs().max() > 0.1  # not rounded to 8 bits
    with pytest.raises(ValueError, match="images have 5 channels, but mean and std have 3"):
        make("tensor")(fine)
    with pytest.raises(ValueError, match="takes RGB images, got 5 channels"):
        make("pil")(fine)
    with pytest.raises(TypeError, match="must be uint8, or float"):
        make("tensor")(torch.zeros(3, 50, 50, dtype=torch.int32))


def test_paths_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="augmentation must be one of pil, tensor, device, got 'gpu'"):
        make("gpu")
    with pytest.raises(ValueError, match="use augmentation='tensor'"):
        make("device", local_crops_subset_of_global_crops=True, patch_size=4)
    with pytest.raises(ValueError, match="needs augmentation='device'"):
        DeviceAugmentation(make("tensor"), device=torch.device("cpu"), dtype=torch.float32)
