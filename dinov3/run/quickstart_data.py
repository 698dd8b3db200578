"""Real images that ordinary Python packages bring along, made into an image folder to train on.

scikit-image and scikit-learn ship photographs inside their wheels. Each photograph is a class: small crops of it.

    <root>/train/<class>/<number>.png    crops of the left part
    <root>/val/<class>/<number>.png      crops of the right part, a gap away: no pixel is in both

Without scikit-image only two photographs are left; then scikit-learn's handwritten digits, scattered over black images,
join in as ten more classes, some of the digits for training and the others held out. Nothing is ever downloaded: what
isn't on this machine is left out.
"""

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Photo:
    """A photograph inside an installed package.

    Attributes:
        name: of the class.
        file: path below the package.
        package: import name of the package.
        title: what it shows.
        credit: photographer or collection.
        licence: as the package states it.
        is_class: whether it is trained on. Not if its sides show different things, so that none tells of the other.
    """

    name: str
    file: str
    package: str
    title: str
    credit: str
    licence: str
    is_class: bool = True

    @property
    def path(self) -> Path | None:
        """Where it lies on this machine, None if the package or the file isn't there."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            return None
        path = Path(next(iter(spec.submodule_search_locations)), self.file)
        return path if path.is_file() else None


def _skimage(name: str, file: str, title: str, credit: str, licence: str, is_class: bool = True) -> Photo:
    return Photo(name, f"data/{file}", "skimage", title, credit, licence, is_class)


def _sklearn(name: str, title: str, credit: str) -> Photo:
    return Photo(name, f"datasets/images/{name}.jpg", "sklearn", title, credit, "CC BY 2.0")


# Whose licence is stated and free: as scikit-image and scikit-learn document their files.
PHOTOS = (
    _sklearn("china", "A pavilion in China", "danielbuechele (Flickr 6061409035)"),
    _sklearn("flower", "A dahlia", "vultilion (Flickr 6056698931)"),
    _skimage("astronaut", "astronaut.png", "Eileen Collins, astronaut", "NASA", "public domain", is_class=False),
    _skimage("brick", "brick.png", "A brick wall", "CC0Textures", "CC0"),
    _skimage("cat", "chelsea.png", "Chelsea the cat", "Stéfan van der Walt", "CC0"),
    _skimage("coffee", "coffee.png", "A cup of coffee", "Rachel Michetti, Pikolo Espresso Bar", "CC0"),
    _skimage("coins", "coins.png", "Greek coins from Pompeii", "Brooklyn Museum", "no known restrictions"),
    _skimage("galaxies", "hubble_deep_field.jpg", "Hubble eXtreme Deep Field", "NASA", "public domain"),
    _skimage("grass", "grass.png", "Grass", "linolafett (DeviantArt)", "CC0"),
    _skimage("gravel", "gravel.png", "Gravel", "CC0Textures", "CC0"),
    _skimage("retina", "retina.jpg", "A human retina", "Mikael Häggström", "CC0"),
    _skimage("rocket", "rocket.jpg", "A Falcon 9 before launch", "SpaceX", "public domain"),
    _skimage("tissue", "ihc.png", "Colonic glands, stained", "CMMI", "no known restrictions"),
    _skimage("writing", "text.png", "Handwriting", "Wikipedia, Corner.png", "public domain"),
)

IMAGE_SIZE = 48  # px of the images written
SHORT_SIDE = 320  # px to which photographs are scaled before crops are cut
CROP_SIDES = (64, 128)  # px in the scaled photograph, smallest and largest
TRAIN_SHARE = 0.6  # of the width of a photograph, and of the handwritten digits
GAP = 8  # px between the two parts of a photograph: scaling mixes pixels less far apart than that
MIN_PHOTOS = 8  # with fewer, digits join in
GLYPH_SIDES = (14, 32)  # px of a digit, smallest and largest
SPLITS = ("train", "val")
_DIGIT = "digit "


def available_photos() -> list[Photo]:
    """The photographs that are on this machine; scikit-image's are left out where it isn't installed."""
    return [photo for photo in PHOTOS if photo.path is not None]


def open_photo(photo: Photo, short_side: int = SHORT_SIDE) -> "Image":
    """The photograph in RGB, its shorter side scaled to `short_side` pixels."""
    from PIL import Image

    with Image.open(str(photo.path)) as image:
        scale = short_side / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


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
        photo.name: partial(_crop, open_photo(photo)) for photo in available_photos() if photo.is_class
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
