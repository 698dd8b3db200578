"""Files that describe data sets: lists, tables, COCO's JSON, tar archives, indices, and folders of features."""

import csv
import io
import json
import random
import shutil
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from dinov3.data.datasets import (
    ADE20K,
    NYU,
    CaptionList,
    CocoCaptions,
    CocoDetection,
    ImageFolder,
    ImageList,
    ImageNet,
    ImageNet22k,
    WebDataset,
    WebDatasetCaptions,
)
from dinov3.data.datasets.coco_detection import read_instances
from dinov3.data.datasets.image_net import read_labels
from dinov3.eval.feature_files import FeatureFiles, FeatureRequest, FeatureWriter
from dinov3.eval.text.prompts import read_lines
from tests.fuzz.core import Reader, require
from tests.fuzz.mutations import Damaged, damage, damage_json_text, damage_text, odd_text
from tests.helpers.images import class_image, write_image_folder


def encoded_image(label: int, number: int) -> bytes:
    """A small PNG file."""
    buffer = io.BytesIO()
    class_image(label, number, size=8).save(buffer, "PNG")
    return buffer.getvalue()


def stays_inside(name: str) -> None:
    """Raise unless a path that a data set gives lies below its folder."""
    path = Path(name)
    require(not path.is_absolute() and ".." not in path.parts, f"{name!r} leads out of the folder")


class CocoFiles(Reader):
    """`CocoDetection`: the JSON file, and the targets of all its images."""

    name, share = "coco detection", 8.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        images = [{"id": 7 * i, "file_name": f"{i}.png", "height": 8, "width": 9 + i} for i in range(3)]
        boxes = [[0, 0, 4, 4], [1.5, 2, 3, 40], [-3, -2, 5, 6]]
        self.content = {
            "images": images,
            "annotations": [
                {"id": i, "image_id": 7 * (i % 2), "category_id": 1 + i, "bbox": box, "area": 1.0, "iscrowd": i // 2}
                for i, box in enumerate(boxes)
            ],
            "categories": [{"id": i, "name": f"c{i}"} for i in (1, 2, 3)],
        }
        self.file("images/0.png", encoded_image(0, 0))

    def make(self, rng: random.Random) -> Path:
        return self.file("by_a_stranger.json", damage_json_text(rng, self.content))

    def read(self, given: Path) -> CocoDetection:
        return CocoDetection(root=self.folder, annotations=given.name, images="images")

    def check(self, given: Path, result: CocoDetection) -> None:
        stored = read_instances(given)
        require(len(result) == len(stored["images"]), "images are missing")
        for i in range(len(result)):
            stays_inside(result.get_image_relpath(i))
            target = result.get_target(i)
            height, width = target["size"]
            boxes = target["boxes"]
            require(len(boxes) == len(target["labels"]), "boxes and labels differ in number")
            require(torch.isfinite(boxes).all() and (boxes >= 0).all(), f"boxes {boxes}")
            require((boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all(), f"boxes {boxes} are outside")
            require((target["labels"] < result.categories.n_classes).all(), "labels beyond the last class")

    def must_name(self, given: Path) -> str:
        return given.name


class CocoCaptionFiles(Reader):
    """`CocoCaptions`."""

    name, share = "coco captions", 3.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.content = {
            "images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)],
            "annotations": [{"id": i, "image_id": i % 2, "caption": f"a {i}"} for i in range(3)],
        }

    def make(self, rng: random.Random) -> Path:
        name = CocoCaptions.Split.VAL.annotation_file
        return self.file(name, damage_json_text(rng, self.content))

    def read(self, given: Path) -> CocoCaptions:
        return CocoCaptions(split=CocoCaptions.Split.VAL, root=self.folder)

    def check(self, given: Path, result: CocoCaptions) -> None:
        for i in range(len(result)):
            stays_inside(str(Path(result.get_image_relpath(i)).relative_to(self.folder)))
            texts = result.get_captions(i)
            require(texts and all(isinstance(text, str) for text in texts), f"captions {texts}")

    def must_name(self, given: Path) -> str:
        return given.name


class Tables(Reader):
    """`ImageList` and `CaptionList`, from CSV, TSV, Parquet and plain lists."""

    name, share = "tables", 10.0
    endings: ClassVar[tuple[str, ...]] = ("csv", "tsv", "parquet", "txt")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.rows = [(f"{i}.png", f"name {i % 3}", f"a caption, {i}") for i in range(12)]
        columns = dict(zip(("path", "label", "caption"), map(list, zip(*self.rows, strict=True)), strict=True))
        self.contents = {"txt": "".join(f"{row[0]}\n" for row in self.rows).encode()}
        for ending, delimiter in (("csv", ","), ("tsv", "\t")):
            text = io.StringIO()
            csv.writer(text, delimiter=delimiter).writerows([tuple(columns), *self.rows])
            self.contents[ending] = text.getvalue().encode()
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
        self.contents["parquet"] = buffer.getvalue()

    def make(self, rng: random.Random) -> tuple[Path, Damaged, bool]:
        ending = rng.choice(self.endings)
        content = self.contents[ending]
        if ending != "parquet" and rng.random() < 0.5:
            text = damage_text(rng, content.decode()).encode("utf-8", "surrogateescape")
            how = Damaged(text, "moved" if text != content else "none")
        else:
            how = damage(rng, content)
        return self.file(f"by_a_stranger.{ending}", how.data), how, rng.random() < 0.5 and ending != "txt"

    def read(self, given: tuple[Path, Damaged, bool]) -> ImageList:
        path, _, with_captions = given
        return CaptionList(file=path) if with_captions else ImageList(file=path)

    def check(self, given: tuple[Path, Damaged, bool], result: ImageList) -> None:
        path, how, with_captions = given
        names = [result.get_image_relpath(i) for i in range(len(result))]
        require(names and all(names), f"names {names}")
        targets = result.get_targets() if not with_captions else None
        require(targets is None or len(targets) == len(names), "names and labels differ in number")
        for i in range(len(names)):
            require(
                not with_captions or all(isinstance(t, str) and t for t in result.get_captions(i)), "an odd caption"
            )
        if path.suffix == ".parquet" and how.kind in ("cut", "none", "overwritten"):
            require(len(names) == len(self.rows) or with_captions, f"{len(names)} rows")
        if how.kind == "none":
            require(names == [row[0] for row in self.rows], f"names {names}")

    def must_name(self, given: tuple[Path, Damaged, bool]) -> str:
        return given[0].name


class Lists(Reader):
    """Lists of ADE20K and NYU, labels of ImageNet, class names and templates."""

    name, share = "lists", 8.0

    def make(self, rng: random.Random) -> tuple[str, Path]:
        kind = rng.choice(("ade20k", "nyu", "labels", "names", "json"))
        text = {
            "ade20k": "a/1.jpg\nb/2.jpg\n",
            "nyu": "/a/1.jpg /a/1.png 518.8\n/b/2.jpg /b/2.png 518.8\n",
            "labels": "n01440764,tench\nn01443537,goldfish\n",
            "names": "Idx\tRatio\tName\n1\t0.5\twall\n2\t0.1\tsky\n",
            "json": '["wall", "sky"]',
        }[kind]
        name = {"ade20k": "ADE20K_object150_val.txt", "nyu": "nyu_test.txt", "json": "names.json"}.get(
            kind, "names.txt"
        )
        if kind == "json":
            data = damage_json_text(rng, json.loads(text))
        elif rng.random() < 0.6:
            extra = rng.choice(("", "../../x.jpg a b\n", "/etc/passwd\n", "a/../../b c d\n", odd_text(rng)))
            data = damage_text(rng, text + extra).encode("utf-8", "surrogateescape")
        else:
            data = damage(rng, text.encode()).data
        return kind, self.file(name, data)

    def read(self, given: tuple[str, Path]) -> Any:
        kind, path = given
        if kind == "ade20k":
            return ADE20K(split=ADE20K.Split.VAL, root=self.folder)
        if kind == "nyu":
            return NYU(split=NYU.Split.VAL, root=self.folder)
        return read_labels(path) if kind == "labels" else read_lines(path)

    def check(self, given: tuple[str, Path], result: Any) -> None:
        kind, path = given
        if kind in ("ade20k", "nyu"):
            lines = [line for line in path.read_text().splitlines() if line.strip()]
            require(len(result) == len(lines), f"{len(result)} samples of {len(lines)} lines")
            for name in (*result.image_paths, *result.target_paths):
                stays_inside(name)
        elif kind == "labels":
            require(all(len(row) == 2 for row in result), f"rows {result}")
        else:
            require(result and all(isinstance(name, str) for name in result), f"names {result}")

    def must_name(self, given: tuple[str, Path]) -> str:
        return given[1].name


class Shards(Reader):
    """`WebDataset` and `WebDatasetCaptions`: all members of a damaged archive, or an error."""

    name, share = "web dataset", 8.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.images = [encoded_image(0, i) for i in range(4)]
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for i, image in enumerate(self.images):
                for ending, data in (("png", image), ("cls", b"%d" % i), ("txt", b"caption"), ("json", b'{"a": 1}')):
                    _add(archive, f"{i:03d}.{ending}", data)
        self.content = buffer.getvalue()

    def make(self, rng: random.Random) -> tuple[Path, Damaged, bool, str]:
        if rng.random() < 0.15:
            content = self._hostile(rng)
            how = Damaged(damage(rng, content).data if rng.random() < 0.3 else content, "other")
        else:
            how = damage(rng, self.content)
        captions = rng.random() < 0.3
        label = rng.choice(("txt", "json:a", "cls")) if captions else rng.choice(("cls", "json:a", "json:b"))
        return self.file("by_a_stranger.tar", how.data), how, captions, label

    def _hostile(self, rng: random.Random) -> bytes:
        """Members with paths that lead elsewhere, links, devices, and odd labels."""
        buffer = io.BytesIO()
        with tarfile.open(
            fileobj=buffer, mode="w", format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
        ) as archive:
            for i in range(3):
                name = rng.choice(("../../", "/etc/", "a/../../", "", "x/" * 80, ".")) + f"{i}.png"
                _add(
                    archive,
                    name,
                    self.images[i],
                    kind=rng.choice((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.REGTYPE)),
                )
                _add(archive, f"{i}.cls", rng.choice((b"1", b"", b"\xff", b"9" * 5000, b"a", b"-", b"[" * 100_000)))
                _add(
                    archive,
                    f"{i}.json",
                    rng.choice((b'{"a": 1}', b"{}", b"[1]", b"x", b'{"a": [1, null]}', b'{"a":' * 5000)),
                )
        return buffer.getvalue()

    def read(self, given: tuple[Path, Damaged, bool, str]) -> WebDataset:
        path, _, captions, label = given
        return (WebDatasetCaptions if captions else WebDataset)(root=path, label=label, index_cache="off")

    def check(self, given: tuple[Path, Damaged, bool, str], result: WebDataset) -> None:
        path, how, *_ = given
        found = [result.get_image_data(i) for i in range(len(result))]
        # An archive whose last blocks are zeros looks like one that has ended before.
        if how.kind in ("none", "cut") or how.kind == "overwritten" and how.n_changed <= 64:
            require(len(found) == len(self.images), f"{len(found)} images after {how.kind}")
            pairs = [
                (a, b) for image, data in zip(self.images, found, strict=True) for a, b in zip(image, data, strict=True)
            ]
            changed = sum(a != b for a, b in pairs)
            require(changed <= how.n_changed, f"{changed} bytes differ, {how.n_changed} were changed")
        require({p.name for p in self.folder.iterdir()} <= {path.name}, "something was unpacked")

    def must_name(self, given: tuple[Path, Damaged, bool, str]) -> str:
        return given[0].name


def _add(archive: tarfile.TarFile, name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = "/etc/passwd" if kind == tarfile.SYMTYPE else ""
    info.size = len(data) if kind == tarfile.REGTYPE else 0
    archive.addfile(info, io.BytesIO(data))


class Entries(Reader):
    """The index of ImageNet and of ImageNet-22k, and the archives that the latter's index is made from."""

    name, share = "entries", 6.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        one = np.array(
            [(1, 0, "n01440764", "tench"), (2, 1, "n01443537", "goldfish")],
            dtype=[("actual_index", "<u4"), ("class_index", "<u4"), ("class_id", "U9"), ("class_name", "U8")],
        )
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for i in range(3):
                _add(archive, f"n0_{i}.JPEG", encoded_image(0, i))
        self.archive = buffer.getvalue()
        self.file("archives/n0.tar", self.archive)
        made = ImageNet22k(root=folder / "archives", extra=folder / "made")
        made.dump_extra()
        self.contents = {
            "imagenet": _npy(one),
            "22k": (folder / "made" / "entries.npy").read_bytes(),
            "archive": self.archive,
        }
        self.hostile = [
            _npy(np.array([(1, 0, "../../x", "t")], dtype=one.dtype)),
            _npy(np.array([(1, "/etc", 0, 512, "a")], dtype=np.load(folder / "made" / "entries.npy").dtype)),
            _npy(np.array([(1, 2)], dtype=[("a", "<u4"), ("b", "<u4")])),
            _npy(np.zeros((2, 2))),
        ]

    def make(self, rng: random.Random) -> tuple[str, Path, Damaged]:
        kind = rng.choice(sorted(self.contents))
        if kind != "archive" and rng.random() < 0.1:
            how = Damaged(rng.choice(self.hostile), "other")
        else:
            how = damage(rng, self.contents[kind])
        name = {"imagenet": "extra/entries-VAL.npy", "22k": "extra/entries.npy", "archive": "damaged/n0.tar"}[kind]
        return kind, self.file(name, how.data), how

    def read(self, given: tuple[str, Path, Damaged]) -> tuple[Any, list[str]]:
        kind, path, _ = given
        if kind == "imagenet":
            dataset: Any = ImageNet(split=ImageNet.Split.VAL, root=self.folder, extra=path.parent)
            return dataset, [dataset.get_image_relpath(i) for i in range(len(dataset))]
        if kind == "22k":
            dataset = ImageNet22k(root=self.folder / "archives", extra=path.parent)
            for i in range(len(dataset)):
                dataset.get_image_data(i)
            return dataset, []
        shutil.rmtree(self.folder / "written", ignore_errors=True)
        dataset = ImageNet22k(root=path.parent, extra=self.folder / "written")
        dataset.dump_extra()
        return dataset, []

    def check(self, given: tuple[str, Path, Damaged], result: tuple[Any, list[str]]) -> None:
        kind, _, how = given
        dataset, names = result
        for name in names:
            stays_inside(name)
        if kind == "archive" and (how.kind in ("none", "cut") or how.kind == "overwritten" and how.n_changed <= 64):
            require(len(dataset) == 3, f"{len(dataset)} of 3 members")


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class Features(Reader):
    """`FeatureFiles`, from all formats."""

    name, share = "features", 6.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
        self.contents: dict[str, dict[str, bytes]] = {}
        for form in ("npy", "safetensors", "parquet"):
            request = FeatureRequest("x", 7, {}, "CLS", [5], {}, form, "fp32", 4)
            writer = FeatureWriter(folder / form, request, _Labels())
            for i, row in enumerate(self.features):
                writer.add(i, row)
            writer.finish()
            self.contents[form] = {path.name: path.read_bytes() for path in sorted((folder / form).iterdir())}

    def make(self, rng: random.Random) -> tuple[str, str, Damaged]:
        form = rng.choice(sorted(self.contents))
        shutil.rmtree(self.folder / "found", ignore_errors=True)
        name = rng.choice(sorted(self.contents[form]))
        content = self.contents[form][name]
        if name.endswith(".json"):
            how = Damaged(damage_json_text(rng, json.loads(content)), "other")
        else:
            how = damage(rng, content)
        for other, data in self.contents[form].items():
            self.file(f"found/{other}", how.data if other == name else data)
        return form, name, how

    def read(self, given: tuple[str, str, Damaged]) -> FeatureFiles:
        return FeatureFiles(root=self.folder / "found")

    def check(self, given: tuple[str, str, Damaged], result: FeatureFiles) -> None:
        form, name, how = given
        rows = [result[i] for i in range(len(result))]
        result.get_targets()
        if how.kind not in ("none", "cut", "overwritten"):
            return
        require(len(rows) == 7, f"{len(rows)} of 7 rows")
        changed = sum(int((row != wanted).sum()) for (row, _), wanted in zip(rows, self.features, strict=True))
        if not name.endswith(".csv") and form != "parquet":  # pages of Parquet are compressed, or have dictionaries
            require(changed <= how.n_changed, f"{changed} values differ, {how.n_changed} bytes were {how.kind}")
        if how.kind != "overwritten":
            require(changed == 0 and [label for _, label in rows] == list(range(7)), "rows differ")


class _Labels:
    class_names = ("a", "b")

    def get_target(self, index: int) -> int:
        return index


class IndexCaches(Reader):
    """Cached indices of folders and shards: a damaged cache is made anew, the data set stays the same."""

    name, share = "index caches", 3.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        write_image_folder(folder / "images", classes=2, per_class=2, size=8)
        import os

        for path in [folder / "images", *(folder / "images").iterdir()]:  # folders that have settled are cached
            os.utime(path, (1e9, 1e9))
        self.file("a.tar", Shards(folder / "unused").content)
        self.names = {kind: self._names(self._open(kind)) for kind in ("folder", "tar")}
        self.caches = {kind: next((folder / kind).iterdir()) for kind in self.names}
        self.contents = {kind: path.read_bytes() for kind, path in self.caches.items()}

    def _open(self, kind: str) -> Any:
        if kind == "folder":
            return ImageFolder(root=self.folder / "images", index_cache=self.folder / kind)
        return WebDataset(root=self.folder / "a.tar", index_cache=self.folder / kind)

    def _names(self, dataset: Any) -> list[tuple[str, Any]]:
        return [(dataset.get_image_relpath(i), dataset.get_target(i)) for i in range(len(dataset))]

    def make(self, rng: random.Random) -> str:
        kind = rng.choice(sorted(self.contents))
        self.file(str(self.caches[kind].relative_to(self.folder)), damage(rng, self.contents[kind]).data)
        return kind

    def read(self, given: str) -> list[tuple[str, Any]]:
        return self._names(self._open(given))

    def check(self, given: str, result: list[tuple[str, Any]]) -> None:
        require(result == self.names[given], f"{result}")
