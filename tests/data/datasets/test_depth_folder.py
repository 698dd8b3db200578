"""Folders of images with depth maps: every format gives metres, and 0 where there is no true depth."""

import io
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.data import make_dataset
from dinov3.data.datasets.depth_folder import Depth, DepthFolder, read_depth

METRES = np.array([[0.0, 1.5, 2.0], [4.25, 8.0, 0.0]], dtype=np.float32)


def write(root: Path, name: str, stored: np.ndarray, size: tuple[int, int] = (3, 2)) -> Path:
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "depth").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(root / "images" / f"{Path(name).stem}.png")
    path = root / "depth" / name
    if path.suffix == ".npy":
        np.save(path, stored)
    elif path.suffix == ".npz":
        np.savez(path, stored)
    else:
        Image.fromarray(stored).save(path)
    return root


@pytest.mark.parametrize(
    ("name", "stored", "keys"),
    [
        ("a.png", (METRES * 1000).astype(np.uint16), ""),
        ("a.png", (METRES * 256).astype(np.uint16), ":scale=256"),
        ("a.png", (METRES * 4).astype(np.uint8), ":scale=4"),
        ("a.tiff", METRES, ""),
        ("a.npy", METRES, ""),
        ("a.npy", METRES[None], ""),
        ("a.npy", METRES[..., None].astype(np.float64), ""),
        ("a.npz", METRES * 100, ":scale=100"),
        ("a.npy", np.where(METRES > 0, METRES, np.nan), ""),
        ("a.npy", np.where(METRES > 0, METRES, -np.inf), ""),
        ("a.png", np.where(METRES > 0, METRES * 1000, 65535).astype(np.uint16), ":invalid=65535"),
    ],
)
def test_formats_and_units(name: str, stored: np.ndarray, keys: str, tmp_path: Path) -> None:
    write(tmp_path, name, stored)
    dataset = make_dataset(dataset_str=f"DepthFolder:root={tmp_path}{keys}")
    image, depth = dataset[0]
    assert image.size == (3, 2)
    assert isinstance(depth, Depth)
    torch.testing.assert_close(depth.as_subclass(torch.Tensor), torch.from_numpy(METRES)[None])


@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_masks_beside_the_depth_maps(suffix: str, tmp_path: Path) -> None:
    write(tmp_path, "a.npy", np.full((2, 3), 3.0))
    mask = np.array([[1, 0, 1], [1, 1, 0]], dtype=np.uint8)
    path = tmp_path / "depth" / f"a_mask{suffix}"
    np.save(path, mask) if suffix == ".npy" else Image.fromarray(mask * 255).save(path)
    _, depth = make_dataset(dataset_str=f"DepthFolder:root={tmp_path}:mask_ending=_mask")[0]
    torch.testing.assert_close(depth.as_subclass(torch.Tensor), 3.0 * torch.from_numpy(mask)[None].float())
    with pytest.raises(ValueError, match=r"a\.npy has no mask depth/a_valid\.png"):
        DepthFolder(root=tmp_path, mask_ending="_valid")


def test_depth_maps_may_be_smaller_than_images(tmp_path: Path) -> None:
    write(tmp_path, "a.npy", METRES, size=(30, 20))
    image, depth = DepthFolder(root=tmp_path)[0]
    assert image.size == (30, 20)
    assert depth.shape == (1, 2, 3)


def test_what_is_no_depth(tmp_path: Path) -> None:
    colours = io.BytesIO()
    Image.new("RGB", (3, 2)).save(colours, format="PNG")
    with pytest.raises(ValueError, match="colours are no"):
        read_depth(colours.getvalue())
    with pytest.raises(ValueError, match="can be decoded"):
        read_depth(b"nothing")
    several = io.BytesIO()
    np.savez(several, a=METRES, b=METRES)
    with pytest.raises(ValueError, match=r"expected one array in the \.npz file, got a, b"):
        read_depth(several.getvalue())
    write(tmp_path, "a.npy", METRES)
    with pytest.raises(ValueError, match="scale is the number of stored units"):
        DepthFolder(root=tmp_path, scale=0.0)
    (tmp_path / "depth" / "a.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="can be decoded") as error:
        DepthFolder(root=tmp_path)[0]
    assert "images/a.png with depth/a.npy" in error.value.__notes__[0]


def test_open_exr_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"\x76\x2f\x31\x01 and more"
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(ImportError, match="pip install OpenEXR"):
        read_depth(data)

    class File:
        def __init__(self, name: str, separate_channels: bool) -> None:
            assert Path(name).read_bytes() == data
            assert separate_channels

        def channels(self) -> dict[str, Any]:
            return {"A": None, "Z": types.SimpleNamespace(pixels=METRES)}

    monkeypatch.setitem(sys.modules, "OpenEXR", types.SimpleNamespace(File=File))
    np.testing.assert_array_equal(read_depth(data), METRES)
