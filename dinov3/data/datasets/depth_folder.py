"""Any folder of images with depth maps: depth data of your own."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from dinov3.data.datasets.pairs import PairFolder

_MILLIMETRES = 1000.0
_NPY, _ZIP, _EXR = b"\x93NUMPY", b"PK\x03\x04", b"\x76\x2f\x31\x01"


class Depth(tv_tensors.Mask):
    """A depth map [metres], float32 `[1, H, W]`; 0: no true depth.

    A mask to transforms of torchvision: resized and rotated by nearest neighbour, never normalised.
    """


class DepthFolder(PairFolder):
    """Items are (RGB image, `Depth` [metres], 0 where there is no true depth).

        <root>/images/[<split>/]a/b.jpg    <root>/depth/[<split>/]a/b.png

    Images and depth maps may differ in size, not in proportions. Depth maps are images of integers (8, 16 or 32 bits)
    or floats (TIFF), arrays (`.npy`, or the only one of an `.npz`), or OpenEXR files (with the package OpenEXR; the
    channel `Z`, `Y`, `R`, or the only one).

    Args:
        root, split, images, annotations, ending, unmatched, transforms, transform, target_transform: see `PairFolder`.
        scale: stored units in a metre; default: 1000 in files of integers (millimetres), 1 in files of floats. KITTI
            has 256.
        invalid: stored value of pixels without a true depth, beside 0, negative values, NaN and infinity.
        mask_ending: names of masks have this after those of the depth maps, beside which they lie: `_mask` for
            `a_depth.npy` and `a_depth_mask.npy`. Masks (images or arrays) are 0 where depth is invalid.

    Raises:
        FileNotFoundError, ValueError: see `PairFolder`; no mask for a depth map, or a scale that isn't positive.
    """

    same_size: ClassVar[bool] = False
    annotation_folders: ClassVar[tuple[str, ...]] = ("depth", "depths", "annotations")
    annotation_suffixes: ClassVar[tuple[str, ...]] = (".png", ".tif", ".tiff", ".pgm", ".npy", ".npz", ".exr")

    def __init__(
        self,
        root: str | Path | None = None,
        split: str | None = None,
        images: str | None = None,
        annotations: str | None = None,
        ending: str = "",
        unmatched: str = "raise",
        scale: float | None = None,
        invalid: float | None = None,
        mask_ending: str | None = None,
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            root=root,
            split=split,
            images=images,
            annotations=annotations,
            ending=ending,
            unmatched=unmatched,
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )
        if scale is not None and not scale > 0:
            raise ValueError(f"DepthFolder: scale is the number of stored units in a metre, got {scale}")
        self.scale, self.invalid = scale, invalid
        self.mask_paths = (
            None if mask_ending is None else [self._mask_path(path, mask_ending) for path in self.target_paths]
        )

    def _mask_path(self, target_path: str, ending: str) -> str:
        stem = Path(target_path).with_suffix("")
        paths = [stem.with_name(stem.name + ending + suffix) for suffix in self.annotation_suffixes]
        found = next((path for path in paths if (Path(self.root) / path).is_file()), None)
        if found is None:
            raise ValueError(f"DepthFolder: {target_path} has no mask {paths[0]} (or of another extension)")
        return found.as_posix()

    def _decode_target(self, index: int) -> Depth:
        """The depth map of a sample; an error if its mask has another size."""
        stored = read_depth(self.get_target(index))
        integers = np.issubdtype(stored.dtype, np.integer)
        scale = self.scale if self.scale is not None else (_MILLIMETRES if integers else 1.0)
        depth = stored.astype(np.float32) / np.float32(scale)
        valid = np.isfinite(depth) & (depth > 0)
        if self.invalid is not None:
            valid &= stored != self.invalid
        if self.mask_paths is not None:
            valid &= self._mask(index, depth.shape)
        return Depth(torch.from_numpy(np.where(valid, depth, np.float32(0)))[None])

    def _mask(self, index: int, shape: tuple[int, ...]) -> np.ndarray:
        assert self.mask_paths is not None
        mask = _read_array((Path(self.root) / self.mask_paths[index]).read_bytes())
        if mask.shape != shape:
            raise ValueError(f"the mask has {mask.shape} pixels, the depth map {shape}: save both in one size")
        return mask != 0


def read_depth(data: bytes) -> np.ndarray:
    """A stored depth map `[H, W]`, as it is, from the bytes of a file; the format is told by the content.

    Raises:
        ValueError: no known format, or other than one channel.
        ImportError: an OpenEXR file without the library.
    """
    array = _read_exr(data) if data.startswith(_EXR) else _read_array(data)
    if array.ndim != 2 or array.dtype.kind not in "uif":
        raise ValueError(
            f"expected one number per pixel, got an array of shape {array.shape} and type {array.dtype}: colours are "
            "no depth"
        )
    return array


def _read_array(data: bytes) -> np.ndarray:
    """An image or array file; an axis of one channel is taken off."""
    if data.startswith((_NPY, _ZIP)):
        loaded = np.load(BytesIO(data), allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            if len(loaded.files) != 1:
                raise ValueError(f"expected one array in the .npz file, got {', '.join(loaded.files)}")
            loaded = loaded[loaded.files[0]]
        array = np.asarray(loaded)
    else:
        try:
            array = np.asarray(Image.open(BytesIO(data)))
        except OSError as error:
            raise ValueError(f"the file is no image that can be decoded: {error}") from error
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
        return array[0] if array.shape[0] == 1 else array[..., 0]
    return array


def _read_exr(data: bytes) -> np.ndarray:
    import tempfile

    try:
        import OpenEXR  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError(
            "OpenEXR depth maps need the package OpenEXR: pip install OpenEXR, or save as .npy"
        ) from error
    with tempfile.NamedTemporaryFile(suffix=".exr") as file:  # the library reads files only
        file.write(data)
        file.flush()
        channels = OpenEXR.File(file.name, separate_channels=True).channels()
        name = next((name for name in ("Z", "Y", "R", *channels) if name in channels), None)
        if name is None:
            raise ValueError("the OpenEXR file has no channel")
        return np.array(channels[name].pixels)
