"""Image lists, tar shards and Hugging Face datasets: the same images and labels, whatever holds them."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinov3.data import make_data_loader, make_dataset
from dinov3.data.datasets import ImageList, WebDataset, web_dataset
from tests.helpers.images import broken_images, class_image, write_image_folder

N_CLASSES, PER_CLASS = 2, 3


def encoded(label: int, number: int) -> bytes:
    buffer = io.BytesIO()
    class_image(label, number).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples() -> list[tuple[str, int, bytes]]:
    return [
        (f"class_{label}/{i:03d}.png", label, encoded(label, i)) for label in range(N_CLASSES) for i in range(PER_CLASS)
    ]


def write_csv(folder: Path) -> str:
    write_image_folder(folder, classes=N_CLASSES, per_class=PER_CLASS)
    rows = [f"{label},{path}" for path, label, _ in samples()]
    (folder / "list.csv").write_text("\n".join(["label,path", *rows]))
    return f"ImageList:file={folder}/list.csv"


def write_parquet(folder: Path) -> str:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    write_image_folder(folder, classes=N_CLASSES, per_class=PER_CLASS)
    paths, labels, _ = zip(*samples(), strict=True)
    parquet.write_table(pyarrow.table({"file": paths, "y": labels}), folder / "list.parquet")
    return f"ImageList:file={folder}/list.parquet:image_column=file:label_column=y"


def write_parquet_with_images(folder: Path) -> str:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    images = [{"bytes": data, "path": path} for path, _, data in samples()]
    labels = [label for _, label, _ in samples()]
    parquet.write_table(pyarrow.table({"image": images, "label": labels}), folder / "list.parquet", row_group_size=2)
    return f"ImageList:file={folder}/list.parquet:image_column=image"


def write_shards(folder: Path) -> str:
    for label in range(N_CLASSES):
        members: dict[str, bytes] = {}
        for path, found, data in samples():
            if found == label:
                members |= {path: data, path.replace(".png", ".cls"): str(label).encode()}
        write_tar(folder / f"shard-{label:04d}.tar", members)
    return f"WebDataset:root={folder}"


def write_hugging_face(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {
        "image": [{"bytes": data, "path": None} for _, _, data in samples()],
        "label": [label for _, label, _ in samples()],
    }
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": part, "test": part.select([0])}).save_to_disk(str(folder / "hf"))
    return f"HuggingFace:root={folder}/hf:split=train"


WRITERS = [write_csv, write_parquet, write_parquet_with_images, write_shards, write_hugging_face]


@pytest.mark.parametrize("write", WRITERS)
def test_every_container_gives_the_same_samples(tmp_path: Path, write: Any) -> None:
    dataset = make_dataset(dataset_str=write(tmp_path))
    assert len(dataset) == N_CLASSES * PER_CLASS
    assert dataset.get_targets().tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.get_targets().dtype == np.int64
    for i in (0, 4, 5, -1):
        image, target = dataset[i]
        assert target == dataset.get_target(i) == (0 if i == 0 else 1)
        assert image.tobytes() == class_image(target, i % PER_CLASS).tobytes()
    assert len({dataset.get_image_relpath(i) for i in range(len(dataset))}) == len(dataset)
    with pytest.raises(IndexError, match="has 6 images"):
        dataset[6]


@pytest.mark.parametrize("write", WRITERS)
def test_workers_read_every_container(tmp_path: Path, write: Any) -> None:
    dataset = make_dataset(dataset_str=write(tmp_path), transform=np.array)
    dataset[0]  # open files before workers are made
    loader = make_data_loader(dataset=dataset, batch_size=2, num_workers=2, shuffle=False, draw_seed=0)
    seen = [images for _, (images, _) in zip(range(3), loader, strict=False)]
    expected = [np.asarray(class_image(i // PER_CLASS, i % PER_CLASS)) for i in range(6)]
    assert np.array_equal(np.concatenate([images.numpy() for images in seen]), np.stack(expected))


def test_lists_may_hold_absolute_paths_and_names_of_classes(tmp_path: Path) -> None:
    paths = write_image_folder(tmp_path / "elsewhere", classes=0, per_class=3)
    names = ["zebra", "ape", "zebra"]
    rows = [f"{path}\t{name}" for path, name in zip(paths, names, strict=True)]
    (tmp_path / "list.tsv").write_text("\n".join(["path\tlabel", *rows]))
    dataset = ImageList(file=tmp_path / "list.tsv", root="/nowhere")
    assert dataset.class_names == ["ape", "zebra"]
    assert [dataset[i][1] for i in range(3)] == [1, 0, 1]
    (tmp_path / "list.txt").write_text("000.png\n\n002.png\n")
    plain = ImageList(file=tmp_path / "list.txt", root=tmp_path / "elsewhere")
    assert (len(plain), plain[1][1], plain.get_targets()) == (2, None, None)
    assert plain[1][0].tobytes() == class_image(0, 2).tobytes()


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("missing.csv", None, FileNotFoundError, "missing.csv does not exist"),
        ("empty.txt", "\n", ValueError, "names no image"),
        ("other.csv", "image,label\na.png,1", ValueError, "no column 'path' .image_column.; its columns: image, label"),
        ("gap.csv", "path,label\na.png,1\nb.png,", ValueError, "sample 1 has no label, while others have"),
        ("gap.csv", "path,label\na.png,1\n,2", ValueError, "has rows without path"),
    ],
)
def test_mistakes_in_lists_are_explained(
    tmp_path: Path, name: str, text: str | None, error: type[Exception], message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        ImageList(file=tmp_path / name)


def test_the_index_of_shards_is_read_again_and_follows_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path)
    WebDataset(root=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(web_dataset, "_scan", lambda *_: pytest.fail("scanned although there is an index"))
        cached = WebDataset(root=tmp_path)
    assert cached[4][0].tobytes() == class_image(1, 1).tobytes()
    write_tar(tmp_path / "shard-0002.tar", {"x.png": encoded(0, 0), "x.cls": b"7"})
    assert WebDataset(root=tmp_path).get_targets().tolist()[-1] == 7
    assert len(WebDataset(root=f"{tmp_path}/shard-000[01].tar")) == 6
    assert len(WebDataset(root=tmp_path / "shard-0002.tar", index_cache="off")) == 1


def test_members_of_shards_are_never_paths(tmp_path: Path) -> None:
    outside = tmp_path / "secret.png"
    outside.write_bytes(encoded(1, 1))
    shard = tmp_path / "shards" / "a.tar"
    write_tar(shard, {"../secret.png": encoded(0, 0), "/etc/x.png": encoded(0, 1)})
    with tarfile.open(shard, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "../secret.png"
        archive.addfile(link)
    dataset = WebDataset(root=shard.parent)
    assert len(dataset) == 2  # what the archive holds; the link holds nothing
    assert [dataset[i][0].tobytes() for i in range(2)] == [class_image(0, i).tobytes() for i in range(2)]
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a.tar", "secret.png"]


def test_labels_from_json_long_names_and_no_labels(tmp_path: Path) -> None:
    long_name = "deep/" * 40 + "0001"
    members = {
        f"{long_name}.png": encoded(0, 0),
        f"{long_name}.json": json.dumps({"kind": "b"}).encode(),
        "2.seg.png": encoded(0, 2),
        "2.json": json.dumps({"kind": "a"}).encode(),
        "only_text.txt": b"no image",
        ".hidden.png": b"",
    }
    write_tar(tmp_path / "a.tar", members)
    dataset = WebDataset(root=tmp_path, label="json:kind")
    assert (dataset.class_names, [dataset[i][1] for i in range(len(dataset))]) == (["a", "b"], [1, 0])
    assert WebDataset(root=tmp_path)[0][1] is None


def test_shards_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder with .tar files, no file, and matches no file"):
        WebDataset(root=tmp_path)
    (tmp_path / "a.tar").write_bytes(b"not a tar archive" * 100)
    with pytest.raises(ValueError, match="a.tar is not an uncompressed tar archive"):
        WebDataset(root=tmp_path)
    write_tar(tmp_path / "a.tar", {"x.txt": b"1"})
    with pytest.raises(ValueError, match="no image in the 1 shards"):
        WebDataset(root=tmp_path)
    write_tar(tmp_path / "a.tar", {"x.png": encoded(0, 0), "x.cls": b"1", "y.png": encoded(0, 1)})
    with pytest.raises(ValueError, match="sample 1 has no label"):
        WebDataset(root=tmp_path)


def test_broken_samples_of_shards_are_skipped(tmp_path: Path) -> None:
    members = {f"{i}.jpg": data for i, data in enumerate(broken_images().values())}
    write_tar(tmp_path / "a.tar", members | {"z.png": encoded(0, 0)})
    dataset = WebDataset(root=tmp_path)
    assert dataset[0][0].tobytes() == class_image(0, 0).tobytes()
    assert set(dataset.unreadable) == {f"a.tar/{i}" for i in range(len(members))}
    with pytest.raises(RuntimeError, match="can not read .*a.tar/0"):
        WebDataset(root=tmp_path, on_error="raise")[0]


def test_hugging_face_folders_say_what_they_hold(tmp_path: Path) -> None:
    root = write_hugging_face(tmp_path).split("=")[1].split(":")[0]
    assert make_dataset(dataset_str=f"HuggingFace:root={root}:split=test").class_names == ["a", "b"]
    with pytest.raises(ValueError, match="split=None, but .* has train, test"):
        make_dataset(dataset_str=f"HuggingFace:root={root}")
    with pytest.raises(ValueError, match="no column 'picture' .image_column.; its columns: image, label"):
        make_dataset(dataset_str=f"HuggingFace:root={root}:split=test:image_column=picture")
    with pytest.raises(ValueError, match="is a single dataset: leave split out"):
        make_dataset(dataset_str=f"HuggingFace:root={root}/train:split=train")
    assert make_dataset(dataset_str=f"HuggingFace:root={root}/train:label_column=none")[0][1] is None


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'dinov3\[formats\]'"):
        make_dataset(dataset_str=f"HuggingFace:root={tmp_path}")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(ImportError, match=r"pip install 'dinov3\[formats\]'"):
        ImageList(file=tmp_path / "a.parquet")
