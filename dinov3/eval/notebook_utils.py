"""What the notebooks share: a backbone, pictures with exact masks that need no download, and features of patches."""

import logging
import os
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from dinov3.data.photos import PHOTOS, bundled_file, open_photo
from dinov3.eval.patches.sizes import resize_to_patches
from dinov3.hub.loading import load_backbone
from dinov3.hub.registry import NORMALIZATIONS, Normalization, Weights
from dinov3.models.backbone import Backbone
from dinov3.models.features import FrozenFeatures
from dinov3.models.vision_transformer import vit_nano
from dinov3.utils.device import default_device

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger("dinov3")

WEIGHTS_VARIABLE, BACKBONE_VARIABLE = "DINOV3_WEIGHTS", "DINOV3_BACKBONE"


def notebook_backbone() -> nn.Module:
    """The backbone that the environment names, in evaluation mode on the default device.

    `DINOV3_WEIGHTS` is a file of weights, `DINOV3_BACKBONE` the hub name they belong to (default `dinov3_vits16`).
    Without them a tiny network with random weights stands in, so that everything runs anywhere; the log says so.
    """
    weights, name = os.environ.get(WEIGHTS_VARIABLE), os.environ.get(BACKBONE_VARIABLE, "dinov3_vits16")
    if weights:
        return load_backbone(name, weights=weights).eval().to(default_device())
    logger.warning(
        f"RANDOM WEIGHTS: the pictures below show what an untrained network of {_TINY_PATCH} px patches sees. Set "
        f"{WEIGHTS_VARIABLE} to a file of weights, and {BACKBONE_VARIABLE} to its hub name ({name}), for real ones."
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vit_nano(patch_size=_TINY_PATCH, n_storage_tokens=4, pos_embed_rope_dtype="fp32")
        model.init_weights()
    return model.eval().to(default_device())


_TINY_PATCH = 8


def photo(name: str, short_side: int | None = None) -> "Image.Image":
    """A real photograph inside an installed package, by name (see `dinov3.data.photos`)."""
    for entry in PHOTOS:
        if entry.name == name:
            return open_photo(entry, short_side)
    raise ValueError(f"no photograph {name!r}; there are {', '.join(entry.name for entry in PHOTOS)}")


def image_to_tensor(
    image: "Image.Image", size: tuple[int, int], normalization: Normalization = NORMALIZATIONS[Weights.LVD1689M]
) -> Tensor:
    """A picture resized to (height, width), scaled to [0, 1] and normalised: float32 `[1, 3, height, width]`."""
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(size, antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(normalization.mean, normalization.std),
        ]
    )
    return cast(Tensor, transform(image.convert("RGB")))[None]


def mask_to_tensor(mask: "Image.Image", size: tuple[int, int]) -> Tensor:
    """The mask of a picture, its largest value 1, resized to (height, width): float32 in [0, 1]."""
    from torchvision.transforms import v2

    transform = v2.Compose([v2.ToImage(), v2.Resize(size, antialias=True), v2.ToDtype(torch.float32, scale=True)])
    return cast(Tensor, transform(mask.convert("L")))[0]


def patch_features(backbone: nn.Module, images: Tensor) -> Tensor:
    """Features of the last block with its final norm: `[h, w, D]` of one image `[1, 3, H, W]`."""
    device = next(backbone.parameters()).device
    features: Tensor = FrozenFeatures(backbone)(images.to(device)).layers[-1].map[0]
    return features.permute(1, 2, 0).float()


def picture_features(backbone: nn.Module, image: "Image.Image", image_size: int) -> Tensor:
    """`patch_features` of a picture resized to about `image_size` pixels in height."""
    stride = cast(Backbone, backbone).stride
    size = resize_to_patches(image.width, image.height, image_size, stride)
    return patch_features(backbone, image_to_tensor(image, size))


class MaskedPicture(NamedTuple):
    """A picture and the exact mask of what stands in it.

    Attributes:
        image: RGB.
        mask: of the same size, mode L: 255 inside.
    """

    image: "Image.Image"
    mask: "Image.Image"


def composed_pictures(count: int, size: tuple[int, int] = (320, 240), seed: int = 0) -> list[MaskedPicture]:
    """Horses with the fur of a cat before several backgrounds, at random places and sizes.

    Args:
        count: number of pictures.
        size: (width, height) of each [pixels].
        seed: of places and sizes.
    """
    generator = np.random.default_rng(seed)
    backgrounds = ("grass", "gravel", "china", "coffee", "brick", "rocket")
    pictures = []
    for index in range(count):
        height = int(size[1] * generator.uniform(0.5, 0.8))
        horse = _horse(height)
        room = (size[0] - horse.width, size[1] - horse.height)
        corner = (int(generator.integers(0, room[0] + 1)), int(generator.integers(0, room[1] + 1)))
        background = photo(backgrounds[index % len(backgrounds)]).resize(size)
        pictures.append(_paste(background, horse, corner))
    return pictures


def composed_video(frames: int = 20, size: tuple[int, int] = (160, 128)) -> list[MaskedPicture]:
    """A horse that walks over a table with a cup of coffee from left to right."""
    horse = _horse(size[1] // 2)
    background = photo("coffee").resize(size)
    way = size[0] - horse.width
    return [
        _paste(background, horse, (way * index // max(frames - 1, 1), size[1] // 4 + index % 3))
        for index in range(frames)
    ]


def _horse(height: int) -> "Image.Image":
    """The silhouette of a horse, mode L: 255 inside, cut to its outline."""
    from PIL import Image

    path = bundled_file("skimage", "data/horse.png")
    if path is None:
        raise FileNotFoundError("the silhouette is in scikit-image: install 'dinov3[demo]'")
    with Image.open(path) as picture:
        dark = np.asarray(picture.convert("RGBA"))[..., :3].mean(axis=-1) < 128
    rows, columns = np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))
    cut = Image.fromarray(255 * dark[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8))
    return cut.resize((round(cut.width * height / cut.height), height), Image.Resampling.NEAREST)


def _paste(background: "Image.Image", shape: "Image.Image", corner: tuple[int, int]) -> MaskedPicture:
    from PIL import Image

    fur = photo("cat").crop((290, 130, 440, 280)).resize(shape.size)
    mask = Image.new("L", background.size)
    mask.paste(shape, corner)
    image = background.copy()
    image.paste(fur, corner, shape)
    return MaskedPicture(image, mask)


def show(*pictures: Any, titles: tuple[str, ...] = (), file: str | None = None) -> None:
    """Pictures side by side, in the notebook and, if asked for, in a file.

    Args:
        pictures: Pillow images, arrays or tensors: `[h, w]` in false colours, `[h, w, 3]` in [0, 1] or uint8.
        titles: above them.
        file: where to save the figure, PNG.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(pictures), figsize=(4 * len(pictures), 4), squeeze=False)
    for index, (axis, picture) in enumerate(zip(axes[0], pictures, strict=True)):
        axis.imshow(picture.cpu().numpy() if isinstance(picture, Tensor) else picture, interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(titles[index] if index < len(titles) else "")
    figure.tight_layout()
    if file is not None:
        figure.savefig(file, dpi=100, bbox_inches="tight")
    plt.show()
    plt.close(figure)
