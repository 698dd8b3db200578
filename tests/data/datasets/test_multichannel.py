from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.data import DataAugmentationDINO, make_dataset
from dinov3.data.datasets.multichannel import MultiChannelDecoder
from dinov3.data.transforms import make_eval_transform


def npy(values: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def tiff(values: np.ndarray, **options: Any) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    buffer = BytesIO()
    tifffile.imwrite(buffer, values, photometric="minisblack", **options)
    return buffer.getvalue()


def png(values: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


VALUES = np.random.default_rng(0).integers(0, 2**16, (5, 12, 16), dtype=np.uint16)


@pytest.mark.parametrize("encode", [npy, tiff])
@pytest.mark.parametrize("last", [False, True])
def test_channels_may_come_first_or_last(encode: Any, last: bool) -> None:
    stored = VALUES.transpose(1, 2, 0).copy() if last else VALUES
    image = MultiChannelDecoder(encode(stored), channels=5).decode()
    assert (image.shape, image.dtype) == ((5, 12, 16), torch.float32)
    torch.testing.assert_close(image, torch.from_numpy(VALUES / np.float32(65535)).float())


def test_bytes_stay_bytes_and_other_types_are_scaled() -> None:
    small = VALUES.astype(np.uint8)
    assert torch.equal(MultiChannelDecoder(npy(small), channels=5).decode(), torch.from_numpy(small))
    twelve_bits = MultiChannelDecoder(npy(VALUES >> 4), channels=5, max_value=4095).decode()
    torch.testing.assert_close(twelve_bits, torch.from_numpy((VALUES >> 4) / np.float32(4095)).float())
    floats = np.array([[np.nan, 0.5, 2.0, -1.0, np.inf]], dtype=np.float64)
    assert MultiChannelDecoder(npy(floats), channels=1).decode().tolist() == [[[0, 0.5, 1, 0, 0]]]
    signed = np.array([[-5, 0, 500, 1000]], dtype=np.int16)
    assert MultiChannelDecoder(npy(signed), channels=1, max_value=1000).decode().tolist() == [[[0, 0, 0.5, 1]]]


def test_what_pillow_reads() -> None:
    grey = VALUES[0]
    torch.testing.assert_close(
        MultiChannelDecoder(png(grey), channels=1).decode()[0], torch.from_numpy(grey / np.float32(65535)).float()
    )
    rgba = VALUES[:4].astype(np.uint8).transpose(1, 2, 0).copy()
    assert torch.equal(MultiChannelDecoder(png(rgba), channels=4).decode(), torch.from_numpy(rgba).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("data", "channels", "message"),
    [
        (npy(VALUES), 4, r"expected an image of 4 channels, got an array of shape \(5, 12, 16\)"),
        (npy(VALUES[0].astype(np.int32)), 1, "int32 have no natural largest value: give max_value"),
        (npy(np.array([{}], dtype=object)), 1, "allow_pickle"),
    ],
)
def test_what_does_not_fit_is_refused(data: bytes, channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiChannelDecoder(data, channels=channels).decode()


def test_a_folder_of_many_channels_is_augmented_and_evaluated(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.npy").write_bytes(npy(np.roll(VALUES, i)))
    (tmp_path / "3.npy").write_bytes(npy(VALUES[:2]))  # too few channels: skipped like a broken file
    (tmp_path / "4.npy").write_bytes(npy(VALUES)[:-10])
    statistics = {"mean": [0.5] * 5, "std": [0.25] * 5}
    augment = DataAugmentationDINO(
        (0.3, 1.0), (0.1, 0.3), 2, global_crops_size=16, local_crops_size=8, augmentation="tensor", **statistics
    )
    text = f"ImageFolder:root={tmp_path}:channels=5"
    dataset = make_dataset(dataset_str=text, transform=augment)
    assert len(dataset) == 5
    output, _ = dataset[3]
    assert [tuple(crop.shape) for crop in output["global_crops"]] == [(5, 16, 16)] * 2
    assert set(dataset.unreadable) == {"3.npy", "4.npy"}
    evaluated = make_dataset(dataset_str=text, transform=make_eval_transform(resize_size=12, crop_size=8, **statistics))
    image, _ = evaluated[0]
    assert (image.shape, image.dtype) == ((5, 8, 8), torch.float32)
    expected = (VALUES[:, 2:10, 4:12] / 65535 - 0.5) / 0.25
    torch.testing.assert_close(torch.as_tensor(image), torch.from_numpy(expected).float())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("channels=0", "channels and max_value must be positive, got 0 and None"),
        ("max_value=3", "max_value is for images read with channels=<number>"),
        ("channels=three", "channels=three of dataset ImageFolder: invalid literal"),
    ],
)
def test_impossible_keys_are_refused(tmp_path: Path, keys: str, message: str) -> None:
    (tmp_path / "a.npy").write_bytes(npy(VALUES))
    with pytest.raises(ValueError, match=message):
        make_dataset(dataset_str=f"ImageFolder:root={tmp_path}:{keys}")
