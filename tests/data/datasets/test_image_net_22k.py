import gzip
import pickle
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from dinov3.data import make_dataset
from dinov3.data.datasets import ImageNet22k
from dinov3.data.datasets.image_net_22k import _as_entries
from tests.helpers.images import class_image


def png(label: int, number: int) -> bytes:
    buffer = BytesIO()
    class_image(label, number).save(buffer, format="PNG")
    return buffer.getvalue()


def write_archives(root: Path, classes: int = 3, per_class: int = 2, zipped: bool = False) -> None:
    root.mkdir(exist_ok=True)
    for label in range(classes):
        with tarfile.open(root / f"n{label}.tar", "w", format=tarfile.GNU_FORMAT) as archive:
            for number in range(per_class):
                # A long name takes blocks of its own before the header.
                member = tarfile.TarInfo(f"n{label}_{number}.JPEG" if number == 0 else "x" * 150 + ".JPEG")
                data = gzip.compress(png(label, number)) if zipped else png(label, number)
                member.size = len(data)
                archive.addfile(member, BytesIO(data))


@pytest.mark.parametrize("zipped", [False, True])
def test_images_are_read_from_the_archives(tmp_path: Path, zipped: bool) -> None:
    write_archives(tmp_path, zipped=zipped)
    ImageNet22k(root=tmp_path, extra=tmp_path / "extra").dump_extra()
    dataset = make_dataset(dataset_str=f"ImageNet22k:root={tmp_path}:extra={tmp_path}/extra")
    assert len(dataset) == 6
    for i in range(6):
        image, target = dataset[i]
        assert target == i // 2 == dataset.get_target(i)
        assert image.tobytes() == class_image(i // 2, i % 2).tobytes()
    assert dataset.get_targets().tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.get_class_ids().tolist() == ["n0", "n1", "n2"]
    assert (dataset.get_class_id(3), dataset.find_class_id(2)) == ("n1", "n2")


def test_block_logs_take_the_place_of_reading_the_archives(tmp_path: Path) -> None:
    write_archives(tmp_path, classes=1)
    from_archive = ImageNet22k(root=tmp_path, extra=tmp_path / "a")
    from_archive.dump_extra()
    entries = np.load(tmp_path / "a/entries.npy")
    lines = [f"block {entry['start_offset'] // 512}: {entry['filename']}" for entry in entries]
    lines.insert(1, f"block {entries[0]['end_offset'] // 512}: n06470073_47249.JPEG")  # left out by name
    lines.append(f"block {entries[-1]['end_offset'] // 512}: ** Block of NULs **")
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks/n0.log").write_text("\n".join(lines) + "\n")
    dataset = ImageNet22k(root=tmp_path, extra=tmp_path / "b")
    dataset.dump_extra()
    assert np.array_equal(np.load(tmp_path / "b/entries.npy"), entries)
    assert dataset[1][0].tobytes() == class_image(0, 1).tobytes()


@pytest.mark.parametrize("log", ["", "block 0: a.JPEG\n", "something else\nblock 3: ** Block of NULs **\n"])
def test_an_unreadable_log_is_refused(tmp_path: Path, log: str) -> None:
    write_archives(tmp_path, classes=1)
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks/n0.log").write_text(log)
    with pytest.raises(ValueError, match=r"n0.log must hold lines 'block <number>: <file>'"):
        ImageNet22k(root=tmp_path, extra=tmp_path).dump_extra()


def test_only_so_many_archives_stay_open(tmp_path: Path) -> None:
    write_archives(tmp_path, classes=4)
    dataset = ImageNet22k(root=tmp_path, extra=tmp_path, mmap_cache_size=2)
    dataset.dump_extra()
    for i in (0, 2, 4, 6, 0):
        dataset[i]
        maps = dict(dataset._archives._maps)
    assert [path.stem for path in maps] == ["n3", "n0"]
    first = maps[tmp_path / "n3.tar"]
    dataset[2]
    assert first.closed


def test_copies_open_the_archives_themselves(tmp_path: Path) -> None:
    write_archives(tmp_path)
    dataset = ImageNet22k(root=tmp_path, extra=tmp_path)
    dataset.dump_extra()
    expected = dataset[0][0].tobytes()
    assert pickle.loads(pickle.dumps(dataset))[0][0].tobytes() == expected


def test_offsets_beyond_4_gib_are_kept() -> None:
    entries = _as_entries([(0, "n0", 2**32 - 512, 2**32 + 512, "a.JPEG")])
    assert entries["end_offset"][0] == 2**32 + 512
    assert entries.dtype["start_offset"] == np.dtype("<u8")
    assert _as_entries([(0, "n0", 0, 1024, "a.JPEG")]).dtype["start_offset"] == np.dtype("<u4")


def test_mistakes_are_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"entries.npy is missing.*dump_extra\(\)"):
        len(ImageNet22k(root=tmp_path, extra=tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no <wnid>.tar in"):
        ImageNet22k(root=tmp_path, extra=tmp_path).dump_extra()
    (tmp_path / "n0.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(ValueError, match=r"n0.tar is not an uncompressed tar archive"):
        ImageNet22k(root=tmp_path, extra=tmp_path).dump_extra()
    with pytest.raises(ValueError, match="mmap_cache_size must be at least 1"):
        ImageNet22k(root=tmp_path, extra=tmp_path, mmap_cache_size=0)
