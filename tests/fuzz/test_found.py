"""What fuzzing has found, one by one."""

import gzip
import io
import json
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov3.checkpointer.files import read_dcp_metadata, read_file, read_safetensors
from dinov3.configs.check import check_config
from dinov3.configs.config import DinoV3SetupArgs, get_cfg_from_args
from dinov3.data.datasets import ADE20K, NYU, CocoCaptions, CocoDetection, ImageList, ImageNet, ImageNet22k, WebDataset
from dinov3.data.datasets.multichannel import MultiChannelDecoder
from dinov3.eval.feature_files import FeatureFiles, FeatureRequest, FeatureWriter
from dinov3.eval.flat_checkpoints import FlatCheckpoints
from dinov3.hub.hf import build_model_from_config
from dinov3.thirdparty.CLIP.clip.simple_tokenizer import SimpleTokenizer
from tests.helpers.images import write_image_folder


def safetensors(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(12), "4 bytes more than its header"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12), "does not begin where"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8), "not valid in a safetensors header"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, bytes(8), "not valid in a safetensors"),
        ({c: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for c in "ab"}, bytes(4), "does not begin where"),
    ],
)
def test_safetensors_have_no_gaps_and_no_overlaps(
    header: dict[str, Any], data: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors(header, data))
    with pytest.raises(ValueError, match=message):
        read_safetensors(path)


def test_a_header_longer_than_the_file_reserves_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((90_000_000).to_bytes(8, "little") + b"{")
    with pytest.raises(ValueError, match="cut off inside its header"):
        read_file(path)


def archive_of(state: dict[str, Tensor], path: Path) -> bytearray:
    torch.save(state, path)
    return bytearray(path.read_bytes())


def test_tensors_that_are_not_where_the_directory_says_are_refused(tmp_path: Path) -> None:
    """torch reads on from another byte in silence: every number of the tensor is then another one."""
    path = tmp_path / "a.pth"
    content = archive_of({"a": torch.arange(100.0)}, path)
    with zipfile.ZipFile(path) as archive:
        header = next(entry.header_offset for entry in archive.infolist() if entry.filename.endswith("data/0"))
    content[header + 28] -= 4  # length of the padding in front of the tensor
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pth is damaged.*a/data/0 does not end where"):
        read_file(path)


def test_a_wrong_bit_in_the_description_of_tensors_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    content = archive_of({"a": torch.zeros(4), "b": torch.ones(4)}, path)
    content[content.index(b"data.pkl") + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pth is damaged.*data\.pkl is not what it was"):
        read_file(path)


def test_a_part_that_is_said_to_be_a_folder_is_refused(tmp_path: Path) -> None:
    """torch reads nothing then, and returns whatever the memory held before."""
    path = tmp_path / "a.pth"
    content = archive_of({"a": torch.arange(100.0)}, path)
    with zipfile.ZipFile(path) as archive:
        name = next(entry.filename for entry in archive.infolist() if entry.filename.endswith("data/0")).encode()
    content[content.rindex(name) - 46 + 38] = 0x10  # external attributes in the directory
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pth is damaged.*a/data/0 is said to be a folder"):
        read_file(path)


def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(3.0)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_file(tmp_path / "a.pth")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", [0, 1])
def test_a_damaged_checkpoint_of_a_head_is_named(kind: int, tmp_path: Path) -> None:
    from dinov3.checkpointer import CheckpointRetentionPolicy

    path = tmp_path / "model_00000001.pth"
    archive_of({"iteration": torch.ones(1)}, path)
    path.write_bytes(path.read_bytes()[:-50] if kind else b"")
    with pytest.raises(ValueError, match=r"model_00000001\.pth"):
        FlatCheckpoints(tmp_path, {}, CheckpointRetentionPolicy.ALL).resume()


def test_an_index_of_a_checkpoint_that_changes_classes_is_refused(tmp_path: Path) -> None:
    # Metadata, with the state (None, {"x": 1}): set the attribute x of the class.
    text = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N(dVx\nI1\nstb."
    (tmp_path / ".metadata").write_bytes(text)
    with pytest.raises(ValueError, match="an index that changes a class is none"):
        read_dcp_metadata(tmp_path)


def test_a_config_that_asks_for_any_number_of_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="num_hidden_layers is 9223372036854775807, expected at most 1,000"):
        build_model_from_config({"model_type": "dinov3_vit", "num_hidden_layers": 2**63 - 1})


def tar(folder: Path, n: int = 4) -> Path:
    path = folder / "a.tar"
    image = write_image_folder(folder / "images", 0, 1, size=8)[0].read_bytes()
    with tarfile.open(path, "w") as archive:
        for i in range(n):
            info = tarfile.TarInfo(f"{i}.png")
            info.size = len(image)
            archive.addfile(info, io.BytesIO(image))
    return path


@pytest.mark.parametrize("how", ["a damaged header", "cut off between members", "two archives"])
def test_a_part_of_an_archive_is_not_taken_for_the_whole(how: str, tmp_path: Path) -> None:
    path = tar(tmp_path)
    assert len(WebDataset(root=path, index_cache="off")) == 4
    with tarfile.open(path) as archive:
        third = archive.getmembers()[2].offset
    content = bytearray(path.read_bytes())
    if how == "a damaged header":
        content[third] ^= 1
    elif how == "two archives":
        content.extend(bytes(content))
    else:
        del content[third:]
    path.write_bytes(content)
    for read in (
        lambda: WebDataset(root=path, index_cache="off"),
        lambda: ImageNet22k(root=tmp_path, extra=tmp_path / "extra").dump_extra(),
    ):
        with pytest.raises(ValueError, match=r"a\.tar is not an uncompressed tar archive, or is damaged"):
            read()


def test_members_of_archives_never_become_files(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.tar"
    path.parent.mkdir()
    image = write_image_folder(tmp_path / "images", 0, 1, size=8)[0].read_bytes()
    with tarfile.open(path, "w") as archive:
        for name in ("../../escaped.png", "/escaped.png"):
            info = tarfile.TarInfo(name)
            info.size = len(image)
            archive.addfile(info, io.BytesIO(image))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    dataset = WebDataset(root=path, index_cache="off")
    assert [dataset.get_image_data(i) == image for i in range(len(dataset))] == [True, True]
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "", 7])
def test_annotations_cannot_name_files_elsewhere(name: Any, tmp_path: Path) -> None:
    image = {"id": 1, "file_name": name, "height": 8, "width": 8}
    content = {"images": [image], "annotations": [], "categories": [{"id": 1}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"a\.json"):
        CocoDetection(root=tmp_path, annotations="a.json", images=".")
    file = tmp_path / CocoCaptions.Split.VAL.annotation_file
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"images": [image], "annotations": [{"image_id": 1, "caption": "a"}]}))
    with pytest.raises(ValueError, match="captions_val2017"):
        CocoCaptions(split=CocoCaptions.Split.VAL, root=tmp_path)


def test_lists_and_indices_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "ADE20K_object150_val.txt").write_text("../a.jpg\n")
    with pytest.raises(ValueError, match=r"val\.txt names '\.\./a\.jpg'"):
        ADE20K(split=ADE20K.Split.VAL, root=tmp_path)
    (tmp_path / "nyu_test.txt").write_text("a.jpg ../../a.png 1\n")
    with pytest.raises(ValueError, match=r"nyu_test\.txt names '\.\./\.\./a\.png'"):
        NYU(split=NYU.Split.VAL, root=tmp_path)
    dtype = [("actual_index", "<u4"), ("class_index", "<u4"), ("class_id", "U9"), ("class_name", "U9")]
    np.save(tmp_path / "entries-VAL.npy", np.array([(1, 0, "../../x", "x")], dtype=dtype))
    with pytest.raises(ValueError, match=r"entries-VAL\.npy names '\.\./\.\./x'"):
        ImageNet(split=ImageNet.Split.VAL, root=tmp_path, extra=tmp_path).get_image_relpath(0)
    np.save(tmp_path / "entries-VAL.npy", np.zeros(3))
    with pytest.raises(ValueError, match="expected an index"):
        len(ImageNet(split=ImageNet.Split.VAL, root=tmp_path, extra=tmp_path))


@pytest.mark.parametrize("name", [".", "./", "/"])
def test_a_list_cannot_name_its_own_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "ADE20K_object150_val.txt").write_text(f"a.jpg\n{name}\n")
    with pytest.raises(ValueError, match=rf"val\.txt must name files, got '{re.escape(name)}'"):
        ADE20K(split=ADE20K.Split.VAL, root=tmp_path)


@pytest.mark.parametrize("value", [0x7FFFFFFF, 0xD800])
def test_texts_of_indices_are_characters(value: int, tmp_path: Path) -> None:
    fields = [("actual_index", "<u4"), ("class_index", "<u4"), ("class_id", "<U9"), ("class_name", "<U9")]
    entries = np.array([(1, 0, "n01440764", "tench")] * 2, dtype=fields)
    entries["class_id"][1:].view("<u4")[0] = entries["class_name"][1:].view("<u4")[0] = value
    np.save(tmp_path / "entries-VAL.npy", entries)
    ids = np.array(["n01440764"])
    ids.view("<u4")[0] = value
    np.save(tmp_path / "class-ids-VAL.npy", ids)
    one = ImageNet(split=ImageNet.Split.VAL, root=tmp_path, extra=tmp_path)
    assert (one.get_class_id(0), one.get_class_name(0)) == ("n01440764", "tench")
    for read in (one.get_image_relpath, one.get_class_id, one.get_class_name):
        with pytest.raises(ValueError, match=r"entries-VAL\.npy is damaged: row 1 holds no text"):
            read(1)
    with pytest.raises(ValueError, match=r"class-ids-VAL\.npy is damaged: row 0 holds no text"):
        one.find_class_id(0)

    fields = [("class_index", "<u4"), ("class_id", "<U9"), ("start_offset", "<u4"), ("end_offset", "<u4")]
    more = np.array([(0, "n01440764", 0, 512, "a")], dtype=[*fields, ("filename", "<U9")])
    more["class_id"].view("<u4")[0] = value
    np.save(tmp_path / "entries.npy", more)
    with pytest.raises(ValueError, match=r"entries\.npy is damaged: row 0 holds no text"):
        ImageNet22k(root=tmp_path, extra=tmp_path).get_image_data(0)


@pytest.mark.parametrize("changed", [{"count": 1 << 48}, {"count": 1 << 48, "shard_size": 1 << 48}])
def test_features_that_claim_any_number_of_rows_take_no_time(changed: dict[str, int], tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path, FeatureRequest("x", 1, {}, "CLS", [5], {}, "npy", "fp32", 4), ImageLabels())
    writer.add(0, torch.ones(5))
    writer.finish()
    assert len(FeatureFiles(root=tmp_path)) == 1
    manifest = json.loads((tmp_path / "features.json").read_text())
    manifest["request"].update(changed)
    (tmp_path / "features.json").write_text(json.dumps(manifest))
    if "shard_size" in changed:  # one shard, whose rows are far fewer than it might have
        assert len(FeatureFiles(root=tmp_path)) == 1
    else:
        with pytest.raises(ValueError, match="are missing, the first is features-00000-of-"):
            FeatureFiles(root=tmp_path)


def test_a_group_of_rows_that_says_it_has_none_is_missed(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    names = [f"{i}.png" for i in range(300)]
    parquet.write_table(pyarrow.table({"path": names}), path, row_group_size=123)
    content = path.read_bytes()
    n_rows = b"\x16\xf6\x01"  # 123 as it stands in the description of groups, after the size in bytes
    at = content.index(n_rows + b"\x26", content.index(b"schema"))
    path.write_bytes(content[:at] + b"\x16\x80\x00" + content[at + 3 :])
    assert len(parquet.read_table(path)) < 300
    with pytest.raises(ValueError, match=r"a\.parquet is damaged: 177 rows of 300 were found"):
        ImageList(file=path)

    writer = FeatureWriter(tmp_path, FeatureRequest("x", 3, {}, "CLS", [5], {}, "parquet", "fp32", 4), ImageLabels())
    for i in range(3):
        writer.add(i, torch.ones(5))
    writer.finish()
    path = tmp_path / "features-00000-of-00001.parquet"
    content = path.read_bytes()
    at = content.rindex(b"\x16\x06\x26")  # 3, as above
    path.write_bytes(content[: at + 1] + b"\0" + content[at + 2 :])
    with pytest.raises(ValueError, match=r"00001\.parquet can't be read: .*0 rows of 3 were found"):
        FeatureFiles(root=tmp_path)


class ImageLabels:
    """Labels of a data set."""

    def get_target(self, index: int) -> int:
        return index


def test_labels_that_no_integer_holds_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"path,label\na.png,{'9' * 5000}\n")
    with pytest.raises(ValueError, match=r"a\.csv: a label has 5000 digits"):
        ImageList(file=tmp_path / "a.csv")


@pytest.mark.parametrize("content", [gzip.compress(b"head\n\na b\n"), gzip.compress(b"head\n" * 99)[:-12] + bytes(12)])
def test_a_damaged_vocabulary_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.gz"):
        SimpleTokenizer(tmp_path / "a.gz")


def test_a_small_tiff_file_that_claims_gigabytes_is_refused_at_once() -> None:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((6, 7, 4), np.uint8), photometric="minisblack", planarconfig="contig")
    content = buffer.getvalue()
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        at = file.pages[0].tags["ImageLength"].valueoffset
    content = (
        content[:at] + (2**28).to_bytes(4, "little")[: 2 if content[at + 2 : at + 4] == b"" else 4] + content[at + 4 :]
    )
    with pytest.raises(ValueError, match="says that it holds"):
        MultiChannelDecoder(content, channels=4).decode()


@pytest.mark.parametrize("back_to", [0, 1, 2])
def test_a_tiff_file_whose_pages_have_no_end_is_refused(back_to: int) -> None:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    pages = np.arange(4 * 6 * 7, dtype=np.uint8).reshape(4, 6, 7)
    tifffile.imwrite(buffer, pages, photometric="minisblack", metadata=None)
    content = bytearray(buffer.getvalue())
    assert MultiChannelDecoder(bytes(content), channels=4).decode().numpy().tolist() == pages.tolist()
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        offsets = [page.offset for page in file.pages]
    assert len(offsets) == 4
    end = offsets[-1] + 2 + 12 * int.from_bytes(content[offsets[-1] : offsets[-1] + 2], "little")
    content[end : end + 4] = offsets[back_to].to_bytes(4, "little")
    with pytest.raises(ValueError, match="chain of pages does not end after 4 of them"):
        MultiChannelDecoder(bytes(content), channels=4).decode()


@pytest.mark.parametrize(
    "override",
    ["optim=1", "optim.lr=[1,2", "crops.teacher_to_student_resolution_scale=0.01", 'optim.lr="\\q"', "train=[]"],
)
def test_overrides_that_cannot_be_read_or_merged_are_said_to_be(override: str) -> None:
    with pytest.raises(ValueError, match="the override .* can't be read|can't be put together|optim|train|scale"):
        check_config(get_cfg_from_args(DinoV3SetupArgs(config_file="", opts=[override])))
