"""Base of the datasets of any folder of images with a folder of annotation images (masks, depth maps) beside it.

Owns how images find their annotations: by equal paths below the two folders, without the extension.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from dinov3.data.datasets.decoders import Decoder, DenseTargetDecoder, UprightImageDataDecoder
from dinov3.data.datasets.file_lists import ImagePairDataset, require_root
from dinov3.data.datasets.index_cache import SUFFIXES

logger = logging.getLogger("dinov3")


class PairFolder(ImagePairDataset):
    """Items are (RGB image turned upright by its EXIF orientation, decoded annotation).

        <root>/images/[<split>/]a/b.jpg   belongs to   <root>/<annotations>/[<split>/]a/b<ending>.png

    or, with the split first, `<root>/<split>/images/…` and `<root>/<split>/<annotations>/…`.

    A subclass says what annotations are: their decoder, the usual names of their folder, their file extensions, and
    whether they have one value per pixel of the image.

    Args:
        root: the folder.
        split: name of a sub-folder.
        images: name of the folder of images; default: the first of `images`, `image`, `rgb` that is there.
        annotations: name of the folder of annotations; default: the first of the usual ones that is there.
        ending: what names of annotations have after those of their images, such as `_mask`.
        unmatched: "raise", or "skip" images without annotation.
        transforms, transform, target_transform: as for torchvision's datasets.

    Raises:
        FileNotFoundError: a folder that isn't there.
        ValueError: no pairs, images without annotation, two files of the same name, an unknown `unmatched`.
    """

    image_folders: ClassVar[tuple[str, ...]] = ("images", "image", "rgb")
    annotation_folders: ClassVar[tuple[str, ...]] = ("annotations",)
    annotation_suffixes: ClassVar[tuple[str, ...]] = SUFFIXES
    annotation_decoder: Callable[[Any], Decoder] = DenseTargetDecoder
    same_size: ClassVar[bool] = True

    def __init__(
        self,
        root: str | Path | None = None,
        split: str | None = None,
        images: str | None = None,
        annotations: str | None = None,
        ending: str = "",
        unmatched: str = "raise",
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        name = type(self).__name__
        folder = require_root(name, root)
        if unmatched not in ("raise", "skip"):
            raise ValueError(f"{name}: unmatched must be 'raise' or 'skip', got {unmatched!r}")
        image_folder = _find_folder(name, folder, split, (images,) if images else self.image_folders)
        target_folder = _find_folder(name, folder, split, (annotations,) if annotations else self.annotation_folders)
        image_paths, target_paths = _match(
            name, image_folder, target_folder, self.annotation_suffixes, ending, unmatched
        )
        super().__init__(
            root=folder,
            image_paths=[(image_folder / path).relative_to(folder).as_posix() for path in image_paths],
            target_paths=[(target_folder / path).relative_to(folder).as_posix() for path in target_paths],
            transforms=transforms,
            transform=transform,
            target_transform=target_transform,
        )
        self.image_decoder = UprightImageDataDecoder
        self.target_decoder = type(self).annotation_decoder
        logger.info(f"{name}: {len(self)} images of {image_folder} with annotations of {target_folder}")

    def get_target_relpath(self, index: int) -> str:
        """Path of a sample's annotation below the root."""
        return self.target_paths[index]

    def decode_target(self, index: int) -> Any:
        """The decoded annotation of a sample.

        Raises:
            ValueError: it can't be decoded.
        """
        try:
            return self._decode_target(index)
        except OSError as error:
            if error.errno is not None:  # of the file system; Pillow's own have no number
                raise
            raise ValueError(f"{Path(self.root) / self.target_paths[index]} can't be decoded: {error}") from error
        except Exception as error:  # decoders of damaged files can raise anything
            raise ValueError(f"{Path(self.root) / self.target_paths[index]} can't be decoded: {error}") from error

    def _decode_target(self, index: int) -> Any:
        """The decoded annotation, with any error that decoders raise."""
        return self.target_decoder(self.get_target(index)).decode()

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """The pair, transformed; an error names its files.

        Raises:
            UnreadableSampleError: the image can't be read.
            ValueError: the annotation can't be decoded, or has another size than the image.
        """
        try:
            image, target = self.decode_image(index), self.decode_target(index)
            if self.same_size and image.size != _size(target):
                raise ValueError(
                    f"the image has {image.width} x {image.height} pixels, its annotation {_size(target)[0]} x "
                    f"{_size(target)[1]}: save both in one size"
                )
            return (image, target) if self.transforms is None else self.transforms(image, target)
        except Exception as error:
            error.add_note(f"while reading {self.image_paths[index]} with {self.target_paths[index]} below {self.root}")
            raise


def _size(target: Any) -> tuple[int, int]:
    """(width, height) of a Pillow image or an array or tensor [..., H, W]."""
    return target.size if isinstance(target, Image.Image) else (target.shape[-1], target.shape[-2])


def _find_folder(dataset: str, root: Path, split: str | None, names: tuple[str, ...]) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"{dataset}: root={root} is not a folder")
    candidates = [root / name if split is None else root / name / split for name in names]
    if split is not None:
        candidates += [root / split / name for name in names]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    tried = ", ".join(str(candidate.relative_to(root)) for candidate in candidates)
    there = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())[:20]) or "none"
    raise FileNotFoundError(
        f"{dataset}: {root} has no folder {tried}; its folders: {there}. Name others with images= and annotations="
    )


def _match(
    dataset: str, images: Path, targets: Path, target_suffixes: tuple[str, ...], ending: str, unmatched: str
) -> tuple[list[Path], list[Path]]:
    """Paths of images and of their annotations, relative to the two folders, in the order of the images' paths."""
    image_files = _by_stem(dataset, images, SUFFIXES)
    target_files = _by_stem(dataset, targets, target_suffixes)
    if not image_files:
        raise ValueError(f"{dataset}: no image below {images} (looked for {', '.join(SUFFIXES)})")
    lonely = [path for stem, path in image_files.items() if stem + ending not in target_files]
    if len(lonely) == len(image_files):
        example = next(iter(image_files))
        raise ValueError(
            f"{dataset}: no image of {images} has an annotation in {targets}: expected {example}{ending} with one of "
            f"{', '.join(target_suffixes)}, found {', '.join(list(target_files)[:3]) or 'none'}. Say ending=<text> if "
            "names of annotations have something after those of the images"
        )
    if lonely:
        message = f"{dataset}: {len(lonely)} of {len(image_files)} images have no annotation in {targets}: {lonely[0]}"
        if unmatched == "raise":
            raise ValueError(f"{message}, … Leave such images out with unmatched=skip")
        logger.warning(f"{message}, …; they are left out")
    stems = [stem for stem in image_files if stem + ending in target_files]
    return [image_files[stem] for stem in stems], [target_files[stem + ending] for stem in stems]


def _by_stem(dataset: str, folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Relative paths of the files below a folder by the same without extension, sorted."""
    found: dict[str, Path] = {}
    for path in sorted(path.relative_to(folder) for path in folder.rglob("*")):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        stem = path.with_suffix("").as_posix()
        if stem in found:
            raise ValueError(f"{dataset}: {found[stem]} and {path} in {folder} have the same name: remove one")
        found[stem] = path
    return found
