"""Small synthetic image folders on disk."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


def class_image(label: int, number: int, size: int = 40, seed: int = 0) -> Image.Image:
    """RGB noise in the tint of a class: different for every (label, number, seed)."""
    rng = np.random.default_rng([seed, label, number])
    tint = np.random.default_rng([seed, label]).integers(40, 216, 3)
    return Image.fromarray(np.clip(tint + rng.normal(0, 25, (size, size, 3)), 0, 255).astype(np.uint8))


def write_image_folder(
    root: Path, classes: int = 3, per_class: int = 4, size: int = 40, seed: int = 0, suffix: str = ".png"
) -> list[Path]:
    """Write `root/class_<c>/<i><suffix>`; returns the paths in sorted order. With 0 classes, images lie in `root`."""
    paths = []
    for label in range(max(classes, 1)):
        folder = root / f"class_{label}" if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            paths.append(folder / f"{number:03d}{suffix}")
            class_image(label, number, size, seed).save(paths[-1])
    return paths


def odd_images() -> dict[str, bytes]:
    """Valid image files of unusual kinds, by file name. All are 40 x 30 pixels when upright."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    sixteen_bits = Image.fromarray(rng.integers(0, 2**16, (30, 40), dtype=np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6  # stored a quarter turn to the left
    return {
        "cmyk.jpg": _encode(rgb.convert("CMYK"), "JPEG"),
        "grey.jpg": _encode(rgb.convert("L"), "JPEG"),
        "bilevel.png": _encode(rgb.convert("1"), "PNG"),
        "16bit.png": _encode(sixteen_bits, "PNG"),
        "16bit.tiff": _encode(sixteen_bits, "TIFF"),
        "palette.png": _encode(rgb.quantize(16), "PNG"),
        "palette_transparent.png": _encode(rgb.quantize(16), "PNG", transparency=bytes(range(16))),
        "alpha.png": _encode(rgb.convert("RGBA"), "PNG"),
        "exif.jpg": _encode(rgb.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=turned),
        "animated.gif": _encode(rgb, "GIF", save_all=True, append_images=[rgb.rotate(180)]),
        "SHOUTED.JPG": _encode(rgb, "JPEG"),
    }


def broken_images() -> dict[str, bytes]:
    """Files with the ending of an image that can't be decoded, by file name."""
    jpeg = _encode(class_image(0, 0), "JPEG")
    png = _encode(class_image(0, 0), "PNG")
    return {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": png[: len(png) // 2],
        "empty.jpg": b"",
        "text.png": b"this is not an image",
        "header_only.jpg": jpeg[:20],
    }


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()
