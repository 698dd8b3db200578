"""Captions from CSV, Parquet and WebDataset shards."""

import csv
import io
import json
import operator
import tarfile
from pathlib import Path

import pytest

from dinov3.data import make_dataset
from dinov3.data.datasets import CaptionList, WebDatasetCaptions
from tests.helpers.images import class_image

FIRST = operator.itemgetter(0)


def encoded(number: int) -> bytes:
    buffer = io.BytesIO()
    class_image(number, 0).save(buffer, format="PNG")
    return buffer.getvalue()


def write_csv(folder: Path, rows: list[tuple[str, str]]) -> Path:
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "caption"), *rows])
    for name, _ in rows:
        (folder / name).write_bytes(encoded(int(Path(name).stem)))
    return folder / "captions.csv"


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_rows_of_one_image_are_its_captions(tmp_path: Path) -> None:
    write_csv(tmp_path, [("1.png", "one, a"), ("0.png", "zéro"), ("1.png", "one b")])
    dataset = make_dataset(dataset_str=f"CaptionList:file={tmp_path}/captions.csv")
    assert len(dataset) == 2
    assert dataset.get_captions(0) == ["one, a", "one b"]
    assert {dataset[0][1] for _ in range(40)} == {"one, a", "one b"}
    image, caption = dataset[1]
    assert caption == "zéro"
    assert image.tobytes() == class_image(0, 0).tobytes()


def test_parquet_holds_paths_or_the_images_themselves(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    (tmp_path / "a.png").write_bytes(encoded(0))
    for name, images in (("paths", ["a.png", "a.png"]), ("bytes", [encoded(0), encoded(1)])):
        table = pyarrow.table({"image": images, "text": ["x", "y"]})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    options = "image_column=image:caption_column=text"
    by_path = make_dataset(dataset_str=f"CaptionList:file={tmp_path}/paths.parquet:{options}")
    assert [by_path.get_captions(i) for i in range(len(by_path))] == [["x", "y"]]
    with_bytes = make_dataset(dataset_str=f"CaptionList:file={tmp_path}/bytes.parquet:{options}")
    assert [with_bytes[i][1] for i in range(2)] == ["x", "y"]
    assert with_bytes[1][0].tobytes() == class_image(1, 0).tobytes()


def test_what_a_list_lacks_is_named(tmp_path: Path) -> None:
    write_csv(tmp_path, [("0.png", "x"), ("1.png", "")])
    with pytest.raises(ValueError, match="row 1 of 2 has no caption"):
        CaptionList(file=tmp_path / "captions.csv")
    with pytest.raises(ValueError, match="no column 'text'"):
        CaptionList(file=tmp_path / "captions.csv", caption_column="text")
    with pytest.raises(FileNotFoundError, match="CaptionList: .*none.csv does not exist"):
        CaptionList(file=tmp_path / "none.csv")


def test_shards_hold_captions_as_text_or_json(tmp_path: Path) -> None:
    write_tar(tmp_path / "text.tar", {"0.png": encoded(0), "0.txt": b"a cat\n", "1.png": encoded(1), "1.txt": b"b"})
    dataset = make_dataset(dataset_str=f"WebDatasetCaptions:root={tmp_path}/text.tar")
    assert [dataset[i][1] for i in range(2)] == ["a cat", "b"]
    content = json.dumps({"captions": ["x", "y"], "url": "z"}).encode()
    write_tar(tmp_path / "json.tar", {"0.jpg": encoded(0), "0.json": content})
    several = WebDatasetCaptions(root=tmp_path / "json.tar", label="json:captions", choose=FIRST)
    assert several.get_captions(0) == ["x", "y"]
    assert several[0][1] == "x"


def test_a_sample_without_a_caption_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": encoded(0), "0.txt": b"x", "1.png": encoded(1)})
    with pytest.raises(ValueError, match="1 of 2 images have no caption, a.tar/1 is the first"):
        WebDatasetCaptions(root=tmp_path)
    write_tar(tmp_path / "a.tar", {"0.png": encoded(0)})
    with pytest.raises(ValueError, match="1 of 1 images have no caption"):
        WebDatasetCaptions(root=tmp_path, index_cache="off")
