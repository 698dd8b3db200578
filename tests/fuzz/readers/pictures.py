"""Images, masks and depth maps of every format."""

import io
import random
from typing import Any, ClassVar

import numpy as np
import tifffile
import torch
from PIL import Image

from dinov3.data.datasets import DepthFolder, SegmentationFolder
from dinov3.data.datasets.decoders import ImageDataDecoder, UndecodableImageError, UprightImageDataDecoder, to_rgb
from dinov3.data.datasets.image_folder import ImageFolder
from tests.fuzz.core import Reader, require
from tests.fuzz.mutations import Damaged, damage
from tests.helpers.images import odd_images


def _bytes(array: np.ndarray | Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    if form == "NPY":
        np.save(buffer, array)
    elif form == "TIFFFILE":
        tifffile.imwrite(buffer, array, **options)
    else:
        image = array if isinstance(array, Image.Image) else Image.fromarray(array)
        image.save(buffer, form, **options)
    return buffer.getvalue()


def pictures() -> dict[str, bytes]:
    """Small files of every format that is decoded as RGB."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    found = {
        f"{form}.{form.lower()}": _bytes(rgb, form) for form in ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
    }
    found["progressive.jpg"] = _bytes(rgb, "JPEG", progressive=True)
    found["lzw.tif"] = _bytes(rgb, "TIFF", compression="tiff_lzw")
    found["deflate.tif"] = _bytes(rgb, "TIFF", compression="tiff_adobe_deflate")
    found["sixteen.png"] = _bytes(rng.integers(0, 2**16, (9, 12), dtype=np.uint16), "PNG")
    found["sixteen.tif"] = _bytes(rng.integers(0, 2**16, (9, 12), dtype=np.uint16), "TIFF")
    found["float.tif"] = _bytes(rng.random((9, 12), dtype=np.float32), "TIFF")
    return found | odd_images()


class Images(Reader):
    """`ImageDataDecoder` and `UprightImageDataDecoder`: size, then pixels, whole or reduced."""

    name, share = "images", 12.0
    errors: ClassVar[tuple[type[Exception], ...]] = (UndecodableImageError,)

    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        self.files = pictures()
        self.decoded = {name: np.asarray(to_rgb(Image.open(io.BytesIO(data)))) for name, data in self.files.items()}

    def make(self, rng: random.Random) -> tuple[str, Damaged, type[ImageDataDecoder], int]:
        name = rng.choice(sorted(self.files))
        kind = rng.choice((ImageDataDecoder, UprightImageDataDecoder))
        return name, damage(rng, self.files[name]), kind, rng.choice((1, 1, 2, 8))

    def read(self, given: tuple[str, Damaged, type[ImageDataDecoder], int]) -> tuple[tuple[int, int], Image.Image]:
        _, how, kind, reduce = given
        encoded = kind(how.data).encoded()
        return encoded.size(), encoded.decode(reduce)

    def check(self, given: Any, result: tuple[tuple[int, int], Image.Image]) -> None:
        name, how, kind, reduce = given
        (width, height), image = result
        require(image.mode == "RGB", f"mode {image.mode}")
        least = (-(-width // reduce), -(-height // reduce))
        require(least <= image.size <= (width, height), f"size {image.size} of {width, height} reduced by {reduce}")
        if reduce == 1:
            require(image.size == (width, height), f"size {image.size}, the header said {width, height}")
        if kind is ImageDataDecoder and reduce == 1 and (how.kind == "none" or how.kind == "cut" and _has_an_end(name)):
            # Formats may have something after the pixels: a file that lacks only that is whole.
            require(np.array_equal(np.asarray(image), self.decoded[name]), f"other pixels, the file was {how.kind}")


def _has_an_end(name: str) -> bool:
    """Whether a decoder can know that pixels are missing (GIF and JPEG decoders fill up what is missing at the end)."""
    return name.rpartition(".")[2] in ("png", "bmp", "ppm", "tif", "tiff")


class ManyChannels(Reader):
    """`MultiChannelDecoder`, through `ImageFolder(channels=…, on_error="raise")`: the error names the file."""

    name, share = "channels", 6.0
    errors: ClassVar[tuple[type[Exception], ...]] = (RuntimeError,)

    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        rng = np.random.default_rng(1)
        small, wide = (
            rng.integers(0, 256, (6, 7, 4), dtype=np.uint8),
            rng.integers(0, 2**16, (6, 7, 4), dtype=np.uint16),
        )
        self.files = {
            "uint8.npy": _bytes(small, "NPY"),
            "uint16.npy": _bytes(wide, "NPY"),
            "float.npy": _bytes(rng.random((4, 6, 7)), "NPY"),
            "a.tif": _bytes(wide, "TIFFFILE", planarconfig="contig", photometric="minisblack"),
            "tiles.tif": _bytes(small, "TIFFFILE", tile=(16, 16), photometric="minisblack", planarconfig="contig"),
            "rgba.png": _bytes(small, "PNG"),
        }

    def make(self, rng: random.Random) -> tuple[str, Damaged]:
        name = rng.choice(sorted(self.files))
        return name, damage(rng, self.files[name])

    def read(self, given: tuple[str, Damaged]) -> torch.Tensor:
        name, how = given
        folder = self.file(f"{name}_folder/by_a_stranger.{name.rpartition('.')[2]}", how.data).parent
        return ImageFolder(root=folder, channels=4, on_error="raise", index_cache="off")[0][0]

    def check(self, given: tuple[str, Damaged], result: torch.Tensor) -> None:
        require(result.ndim == 3 and result.shape[0] == 4, f"shape {tuple(result.shape)}")
        require(result.dtype in (torch.uint8, torch.float32), f"dtype {result.dtype}")
        if result.is_floating_point():
            require(((result >= 0) & (result <= 1)).all(), "values outside [0, 1]")
        if given[1].kind == "cut" and given[0].endswith((".npy", ".png")):
            require(given[0] == "rgba.png", "a part was read")

    def must_name(self, given: tuple[str, Damaged]) -> str:
        return "by_a_stranger"


class Masks(Reader):
    """`SegmentationFolder` and `DepthFolder`."""

    name, share = "masks", 8.0

    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        rng = np.random.default_rng(2)
        classes = rng.integers(0, 9, (6, 7), dtype=np.uint8)
        palette = Image.fromarray(classes).convert("P")
        depth = rng.integers(1, 5000, (6, 7), dtype=np.uint16)
        npz = io.BytesIO()
        np.savez_compressed(npz, depth=depth)
        self.files = {
            "segmentation": {
                "png": _bytes(classes, "PNG"),
                "tif": _bytes(classes, "TIFF"),
                "bmp": _bytes(classes, "BMP"),
                "pgm": _bytes(classes, "PPM"),
                "palette.png": _bytes(palette, "PNG"),
                "16.png": _bytes(classes.astype(np.uint16), "PNG"),
            },
            "depth": {
                "png": _bytes(depth, "PNG"),
                "tif": _bytes((depth / 1000).astype(np.float32), "TIFF"),
                "npy": _bytes((depth / 1000).astype(np.float64), "NPY"),
                "npz": npz.getvalue(),
                "pgm": _bytes(depth, "PPM"),
            },
        }
        self.image = _bytes(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8), "PNG")

    def make(self, rng: random.Random) -> tuple[str, str, Damaged]:
        kind = rng.choice(sorted(self.files))
        form = rng.choice(sorted(self.files[kind]))
        return kind, form, damage(rng, self.files[kind][form])

    def read(self, given: tuple[str, str, Damaged]) -> Any:
        kind, form, how = given
        root = self.folder / f"{kind}_{form}"
        if not root.exists():
            self.file(f"{root.name}/images/a.png", self.image)
        folder = "annotations" if kind == "segmentation" else "depth"
        self.file(f"{root.name}/{folder}/a.{form.rpartition('.')[2]}", how.data)
        dataset = (SegmentationFolder if kind == "segmentation" else DepthFolder)(root=root)
        return dataset[0][1]

    def check(self, given: tuple[str, str, Damaged], result: Any) -> None:
        kind, form, how = given
        if kind == "segmentation":
            require(result.size == (7, 6) and result.mode in ("L", "I"), f"{result.size} {result.mode}")
            return
        require(result.dtype == torch.float32 and result.ndim == 3 and result.shape[0] == 1, f"{result.shape}")
        require(torch.isfinite(result).all() and (result >= 0).all(), "depths that aren't depths")
        if how.kind == "none":
            require(tuple(result.shape) == (1, 6, 7), f"{result.shape}")

    def must_name(self, given: tuple[str, str, Damaged]) -> str:
        return "a."
