"""Small data sets in the layouts of ImageNet-1k and ImageNet-22k."""

import io
import tarfile
from pathlib import Path

from dinov3.data.datasets import ImageNet, ImageNet22k
from tests.helpers.images import class_image

CLASSES = ("n01440764", "n01443537")


def write_imagenet(root: Path, *, per_class: int = 6, size: int = 40) -> str:
    """Write images and index files; returns the arguments `root=...:extra=...` of a dataset string."""
    for label, wnid in enumerate(CLASSES):
        for i in range(per_class):
            number = label * per_class + i + 1
            _write(root / "train" / wnid / f"{wnid}_{i + 1}.JPEG", label, i, size)
            _write(root / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG", label, 100 + i, size)
            _write(root / "test" / f"ILSVRC2012_test_{number:08d}.JPEG", label, 200 + i, size)
    (root / "labels.txt").write_text("".join(f"{wnid},class {label}\n" for label, wnid in enumerate(CLASSES)))
    for split in ImageNet.Split:
        ImageNet(split=split, root=str(root), extra=str(root / "extra")).dump_extra()
    return f"root={root}:extra={root / 'extra'}"


def write_imagenet22k(root: Path, *, per_class: int = 6, size: int = 40) -> str:
    """Write archives and index files; returns the arguments `root=...:extra=...` of a dataset string."""
    root.mkdir(parents=True)
    for label, wnid in enumerate(CLASSES):
        with tarfile.open(root / f"{wnid}.tar", "w") as archive:
            for i in range(per_class):
                buffer = io.BytesIO()
                class_image(label, i, size).save(buffer, "JPEG", quality=95)
                member = tarfile.TarInfo(f"{wnid}_{i}.JPEG")
                member.size = buffer.tell()
                buffer.seek(0)
                archive.addfile(member, buffer)
    ImageNet22k(root=root, extra=root / "extra").dump_extra()
    return f"root={root}:extra={root / 'extra'}"


def _write(path: Path, label: int, number: int, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    class_image(label, number, size).save(path, "JPEG", quality=95)
