"""Real photographs that ordinary Python packages bring along, for examples that need no download.

scikit-image and scikit-learn ship pictures inside their wheels. Owns which of them may be used, where they lie, and who
made them; what is made of them belongs to the quick start and to the examples of the tasks. Neither package is
imported.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


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
        return bundled_file(self.package, self.file)


def bundled_file(package: str, file: str) -> Path | None:
    """Where a file of an installed package lies, None if the package or the file isn't there.

    Args:
        package: import name.
        file: path below the package's folder.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations)), file)
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


def available_photos() -> list[Photo]:
    """The photographs that are on this machine; scikit-image's are left out where it isn't installed."""
    return [photo for photo in PHOTOS if photo.path is not None]


def photo_or_other(name: str, number: int) -> Photo:
    """The photograph of that name; where it isn't on this machine, another one in its place.

    Args:
        name: of one in `PHOTOS`.
        number: decides which other one.

    Raises:
        FileNotFoundError: there is none at all.
    """
    known = {photo.name: photo for photo in available_photos()}
    if not known:
        raise FileNotFoundError("no photographs on this machine: install 'dinov3[demo]'")
    return known.get(name) or known[sorted(known)[number % len(known)]]


def open_photo(photo: Photo, short_side: int | None = None) -> Image.Image:
    """The photograph in RGB.

    Args:
        photo: one of `available_photos`.
        short_side: length that its shorter side is scaled to [pixels]; None: as it is.

    Raises:
        FileNotFoundError: it isn't on this machine.
    """
    if photo.path is None:
        raise FileNotFoundError(f"{photo.file} of {photo.package} is not on this machine: install 'dinov3[demo]'")
    with Image.open(photo.path) as image:
        rgb = image.convert("RGB")
    if short_side is None:
        return rgb
    scale = short_side / min(rgb.size)
    size = (round(rgb.width * scale), round(rgb.height * scale))
    return rgb.resize(size, Image.Resampling.LANCZOS)
