"""Images with boxes, described by a JSON file in the form of COCO's instances.

Owns how such files are read, which objects count, and how their category ids become classes.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchvision import tv_tensors

from dinov3.data.datasets.decoders import ImageDataDecoder
from dinov3.data.datasets.extended import ExtendedVisionDataset
from dinov3.data.datasets.file_lists import require_inside, require_root
from dinov3.utils.files import read_json

_KEYS = ("images", "annotations", "categories")
# Ids up to here are classes as they are, so that heads trained on COCO (80 ids up to 90) and their files agree.
_MAX_ID_AS_CLASS = 90


@dataclass(frozen=True)
class Categories:
    """Which class stands for which category.

    Class 0 is none: detectors train it as "any object". If all ids lie between 1 and 90, a category's class is its id
    (as for COCO); otherwise classes are counted from 1 in the order of the ids.

    Attributes:
        ids: category ids, ascending.
        names: of each.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def class_of(self) -> dict[int, int]:
        """Category id -> class."""
        direct = all(1 <= category <= _MAX_ID_AS_CLASS for category in self.ids)
        return {category: category if direct else rank for rank, category in enumerate(self.ids, start=1)}

    @property
    def id_of(self) -> dict[int, int]:
        """Class -> category id; classes that stand for nothing are not there."""
        return {label: category for category, label in self.class_of.items()}

    @property
    def n_classes(self) -> int:
        """Largest class plus one."""
        return max(self.class_of.values(), default=0) + 1

    @property
    def class_names(self) -> list[str]:
        """Name by class; "" where a class stands for nothing."""
        names = [""] * self.n_classes
        for category, name in zip(self.ids, self.names, strict=True):
            names[self.class_of[category]] = name
        return names


class CocoDetection(ExtendedVisionDataset):
    """Items are (RGB image, target), the images in the order of the file, also those without objects.

    A target is a dictionary: `boxes` (`tv_tensors.BoundingBoxes`, xyxy in pixels, float32 `[n, 4]`), `labels` (int64
    `[n]`, see `Categories`), `image_id`, `size` (height, width). Boxes are clipped to the image; crowds and boxes of
    which nothing is left are no objects here (COCO's evaluation treats them by its own rules).

    Args:
        root: the folder.
        split: such as `val2017`, for the layout of COCO: images in `<root>/<split>`, objects in
            `<root>/annotations/instances_<split>.json`.
        annotations: path of the JSON file below the root, instead.
        images: folder of the images below the root, instead.
        transforms, transform, target_transform: as for torchvision's datasets.

    Raises:
        ValueError: no root, neither split nor annotations, or a JSON file of another form.
        FileNotFoundError: a file or folder that isn't there.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        split: str | None = None,
        annotations: str | None = None,
        images: str | None = None,
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        folder = require_root("CocoDetection", root)
        if annotations is None and split is None:
            raise ValueError(
                "CocoDetection needs split, such as val2017, or annotations, the path of a JSON file below the root"
            )
        super().__init__(
            image_decoder=ImageDataDecoder,
            root=folder,
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )
        self.annotation_file = folder / (annotations or f"annotations/instances_{split}.json")
        self.image_folder = folder / (images if images is not None else split or "")
        if not self.image_folder.is_dir():
            raise FileNotFoundError(f"CocoDetection: {self.image_folder} is missing: it holds the images")
        self.coco = read_instances(self.annotation_file)
        self.categories = _categories(self.coco, self.annotation_file)
        self._images: list[Mapping[str, Any]] = list(self.coco["images"])
        self._objects: dict[Any, list[Mapping[str, Any]]] = {image["id"]: [] for image in self._images}
        for annotation in self.coco["annotations"]:
            self._objects[annotation["image_id"]].append(annotation)

    def __len__(self) -> int:
        return len(self._images)

    def image_id(self, index: int) -> int:
        """The id of a sample's image."""
        return int(self._images[index]["id"])

    def get_image_relpath(self, index: int) -> str:
        """Path of a sample's image below the folder of images."""
        return str(self._images[index]["file_name"])

    def get_image_data(self, index: int) -> bytes:
        """The encoded image of a sample."""
        return (self.image_folder / self.get_image_relpath(index)).read_bytes()

    def get_target(self, index: int) -> dict[str, Any]:
        """The objects of a sample; see the class."""
        image = self._images[index]
        height, width = int(image["height"]), int(image["width"])
        objects = [one for one in self._objects[image["id"]] if not one.get("iscrowd", 0)]
        boxes = torch.tensor([one["bbox"] for one in objects], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
        boxes = boxes.float()
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        class_of = self.categories.class_of
        labels = torch.tensor([class_of[one["category_id"]] for one in objects], dtype=torch.int64)
        return {
            "boxes": tv_tensors.BoundingBoxes(boxes[keep], format="XYXY", canvas_size=(height, width)),
            "labels": labels[keep],
            "image_id": self.image_id(index),
            "size": (height, width),
        }

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """The sample, transformed.

        Raises:
            UnreadableSampleError: the image can't be read.
            ValueError: it has another size than the JSON file says.
        """
        image, target = self.decode_image(index), self.get_target(index)
        if (image.height, image.width) != target["size"]:
            raise ValueError(
                f"{self.image_folder / self.get_image_relpath(index)} has {image.width} x {image.height} pixels, but "
                f"{self.annotation_file} says {target['size'][1]} x {target['size'][0]}"
            )
        return (image, target) if self.transforms is None else self.transforms(image, target)


def read_instances(path: Path) -> dict[str, Any]:
    """The content of a JSON file, checked.

    Raises:
        FileNotFoundError: it isn't there.
        ValueError: it has another form, or refers to images or categories that it doesn't hold.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"CocoDetection: {path} is missing: it holds the objects, in the form of COCO's instances"
        )
    content = read_json(path)
    lacking = [key for key in _KEYS if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if lacking:
        raise ValueError(f"{path} is not in the form of COCO's instances: it has no list of {', '.join(lacking)}")
    for kind in _KEYS:
        for one in content[kind]:
            if problem := _problem(kind, one):
                raise ValueError(f"{path}: {kind} hold {_shortened(one)}: {problem}")
    for image in content["images"]:
        require_inside("CocoDetection", image.get("file_name"), path)
    for kind in ("images", "categories"):
        repeated = [key for key, n in Counter(one["id"] for one in content[kind]).items() if n > 1]
        if repeated:
            raise ValueError(f"{path}: ids of {kind} occur twice: {repeated[:5]}")
    images, categories = ({one["id"] for one in content[kind]} for kind in ("images", "categories"))
    for annotation in content["annotations"]:
        if annotation.get("image_id") not in images or annotation.get("category_id") not in categories:
            raise ValueError(
                f"{path}: annotation {annotation.get('id')} refers to an image or category that isn't there"
            )
        if not _is_box(annotation.get("bbox")):
            raise ValueError(
                f"{path}: annotation {annotation.get('id')} has no bbox [left, top, width, height]: "
                f"{annotation.get('bbox')!r}"
            )
    return content


def _problem(kind: str, one: Any) -> str | None:
    """Why an entry can't be used; references between entries are looked at elsewhere."""
    if not isinstance(one, dict):
        return "expected an object"
    numbers = {"images": ("id", "height", "width"), "categories": ("id",), "annotations": ("image_id", "category_id")}
    for key in numbers[kind]:
        if not isinstance(one.get(key), int) or abs(one[key]) >= 2**63:
            return f"{key} must be a whole number"
    if kind == "images" and min(one["height"], one["width"]) < 1:
        return "height and width must be positive"
    return None


def _shortened(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _is_box(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 4 and all(_is_finite(x) for x in value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300 and math.isfinite(value)


def _categories(content: Mapping[str, Any], path: Path) -> Categories:
    if not content["categories"]:
        raise ValueError(f"{path} has no categories")
    by_id = sorted((int(one["id"]), str(one.get("name", one["id"]))) for one in content["categories"])
    return Categories(tuple(category for category, _ in by_id), tuple(name for _, name in by_id))
