"""The photographs that ordinary Python packages bring along (`data/photos.py`), made into an image folder to train on.

Each photograph is a class: small crops of it.

    <root>/train/<class>/<number>.png    crops of the left part
    <root>/val/<class>/<number>.png      crops of the right part, a gap away: no pixel is in both

Without scikit-image only two photographs are left; then scikit-learn's handwritten digits, scattered over black images,
join in as ten more classes, some of the digits for training and the others held out. Nothing is ever downloaded: what
isn't on this machine is left out.
"""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dinov3.data.photos import available_photos, open_photo

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SIZE = 48  # px of the images written
SHORT_SIDE = 320  # px to which photographs are scaled before crops are cut
CROP_SIDES = (64, 128)  # px in the scaled photograph, smallest and largest
TRAIN_SHARE = 0.6  # of the width of a photograph, and of the handwritten digits
GAP = 8  # px between the two parts of a photograph: scaling mixes pixels less far apart than that
MIN_PHOTOS = 8  # with fewer, digits join in
GLYPH_SIDES = (14, 32)  # px of a digit, smallest and largest
SPLITS = ("train", "val")
_DIGIT = "digit "


def write_image_folder(root: Path, *, n_train: int, n_val: int, seed: int = 0) -> dict[str, int]:
    """Write `root/{train,val}/<class>/`; what was in these folders is replaced.

    Args:
        root: the image folder.
        n_train: images per class to train on.
        n_val: held-out images per class.
        seed: of all random choices.

    Returns:
        The number of images of each split.
    """
    classes = _classes()
    counts = {"train": n_train, "val": n_val}
    for split, count in counts.items():
        shutil.rmtree(root / split, ignore_errors=True)
        for number, (name, draw) in enumerate(classes.items()):
            rng = np.random.default_rng([seed, number, SPLITS.index(split)])
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                draw(split, rng).save(folder / f"{i:04d}.png")
    return {split: count * len(classes) for split, count in counts.items()}


Draw = Callable[[str, np.random.Generator], "Image"]  # (split, rng) -> an image of IMAGE_SIZE


def _classes() -> dict[str, Draw]:
    """By name of the class, what draws an image of it."""
    classes: dict[str, Draw] = {
        photo.name: partial(_crop, open_photo(photo, SHORT_SIDE)) for photo in available_photos() if photo.is_class
    }
    if len(classes) < MIN_PHOTOS:
        classes |= {f"{_DIGIT}{digit}": partial(_scatter, glyphs) for digit, glyphs in _glyphs().items()}
    return classes


def is_digit(class_name: str) -> bool:
    """Whether images of this class are handwritten digits, and not crops of a photograph."""
    return class_name.startswith(_DIGIT)


def _crop(photo: "Image", split: str, rng: np.random.Generator) -> "Image":
    """A square crop of random size and place, left of the cut for training, right of the gap otherwise."""
    from PIL import Image

    cut = int(photo.width * TRAIN_SHARE)
    left, right = (0, cut) if split == "train" else (cut + GAP, photo.width)
    side = min(int(rng.integers(CROP_SIDES[0], CROP_SIDES[1], endpoint=True)), right - left)
    x = int(rng.integers(left, right - side, endpoint=True))
    y = int(rng.integers(0, photo.height - side, endpoint=True))
    # Cut first: resizing with `box` would look at pixels around it.
    return photo.crop((x, y, x + side, y + side)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)


def _scatter(glyphs: Sequence["Image"], split: str, rng: np.random.Generator) -> "Image":
    """A handwritten digit of random size at a random place on black."""
    from PIL import Image

    cut = int(len(glyphs) * TRAIN_SHARE)
    glyph = glyphs[int(rng.integers(0, cut) if split == "train" else rng.integers(cut, len(glyphs)))]
    side = int(rng.integers(GLYPH_SIDES[0], GLYPH_SIDES[1], endpoint=True))
    place = rng.integers(0, IMAGE_SIZE - side, size=2, endpoint=True).tolist()
    canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    canvas.paste(glyph.resize((side, side), Image.Resampling.BICUBIC), tuple(place))
    return canvas


def _glyphs() -> dict[int, list["Image"]]:
    """The 8 x 8 grey images of scikit-learn's `load_digits`, by digit."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = (digits.images * (255 / 16)).round().astype(np.uint8)  # stored as 0 to 16
    return {digit: [Image.fromarray(glyph) for glyph in grey[digits.target == digit]] for digit in range(10)}
