"""COCO captions: images with several sentences each."""

import random
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from dinov3.data.datasets.decoders import ImageDataDecoder, TargetDecoder
from dinov3.data.datasets.extended import ExtendedVisionDataset
from dinov3.data.datasets.file_lists import require_inside, require_root, require_split
from dinov3.utils.files import read_json


class _Split(Enum):
    TRAIN = "train2014"
    VAL = "val2017"

    @property
    def annotation_file(self) -> str:
        """Path of the captions below the root."""
        return f"annotations_trainval{self.value[-4:]}/annotations/captions_{self.value}.json"

    @property
    def image_folder(self) -> str:
        """Path of the images below the root."""
        return f"{self.value}/{self.value}"


class CocoCaptions(ExtendedVisionDataset):
    """Items are (RGB image, one of its captions), in the order of the annotation file; images without captions are
    left out.

    Args:
        split: `CocoCaptions.Split.TRAIN` (2014) or `VAL` (2017).
        root: folder that holds `annotations_trainval2014`, `train2014/train2014` and so on.
        choose: picks a caption from the list; by default `random.choice` at every access. `operator.itemgetter(0)`
            always takes the first, `random.Random(seed).choice` is repeatable.
        transforms, transform, target_transform: as for torchvision's datasets.

    Raises:
        ValueError: no root, or an annotation file of another form. TypeError: no split. FileNotFoundError: no
            annotation file.
    """

    Split = _Split

    def __init__(
        self,
        split: _Split | None = None,
        root: str | Path | None = None,
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
        *,
        choose: Callable[[list[str]], str] | None = None,
    ) -> None:
        folder = require_root("CocoCaptions", root)
        self.split = require_split("CocoCaptions", split, _Split)
        super().__init__(
            image_decoder=ImageDataDecoder,
            target_decoder=TargetDecoder,
            root=folder,
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )
        self._choose = choose or random.choice
        self._samples = _read_annotations(folder / self.split.annotation_file)

    def __len__(self) -> int:
        return len(self._samples)

    def get_image_relpath(self, index: int) -> str:
        """Path of a sample's image, the root included."""
        return str(Path(self.root) / self.split.image_folder / self._samples[index][0])

    def get_image_data(self, index: int) -> bytes:
        """The encoded image of a sample."""
        return Path(self.get_image_relpath(index)).read_bytes()

    def get_target(self, index: int) -> str:
        """One caption of a sample, chosen anew."""
        return self._choose(self.get_captions(index))

    def get_captions(self, index: int) -> list[str]:
        """All captions of a sample, in the order of the annotation file."""
        return list(self._samples[index][1])


def _read_annotations(path: Path) -> list[tuple[str, list[str]]]:
    """(file name, captions) of every image that has captions."""
    if not path.is_file():
        raise FileNotFoundError(f"CocoCaptions: {path} is missing: it holds the captions of this split")
    content = read_json(path)
    captions: dict[int, list[str]] = {}
    try:
        for annotation in content["annotations"]:
            captions.setdefault(int(annotation["image_id"]), []).append(_as_text(annotation["caption"]))
        images = [(int(image["id"]), image["file_name"]) for image in content["images"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not in the form of COCO's captions: {error!r}") from error
    named = [(require_inside("CocoCaptions", name, path), number) for number, name in images]
    return [(name, captions[number]) for name, number in named if number in captions]


def _as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a caption is {value!r}")
    return value
