import logging
import os
import time
from pathlib import Path

import pytest

from dinov3.data.datasets import index_cache
from dinov3.data.datasets.index_cache import cache_folder, load_or_build_index
from tests.helpers.images import write_image_folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    write_image_folder(folder, classes=2, per_class=3)
    settle(folder)
    return folder


def settle(folder: Path) -> None:
    """Make the folders look unchanged for a minute."""
    for path in (folder, *folder.glob("**/")):
        os.utime(path, (time.time() - 60,) * 2)


def refuse_to_scan(folder: Path, suffixes: tuple[str, ...]) -> None:
    raise AssertionError("the folder was listed again")


def test_the_second_time_the_list_comes_from_the_cache(
    images: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = load_or_build_index(images)
    assert len(list((cache_folder / "image_folder").iterdir())) == 1
    monkeypatch.setattr(index_cache, "_scan", refuse_to_scan)
    cached = load_or_build_index(images)
    assert [cached.path(i) for i in range(6)] == [built.path(i) for i in range(6)]
    assert cached.targets.tolist() == built.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert cached.class_names == built.class_names


@pytest.mark.parametrize("change", ["add", "remove", "rename", "new folder", "remove folder"])
def test_a_change_anywhere_below_is_noticed(images: Path, change: str) -> None:
    load_or_build_index(images)
    first = images / "class_1" / "000.png"
    if change == "add":
        (images / "class_1" / "more.png").write_bytes(first.read_bytes())
    elif change == "remove":
        first.unlink()
    elif change == "rename":
        first.rename(first.with_name("zzz.png"))
    elif change == "new folder":
        write_image_folder(images / "class_1" / "deeper", classes=0, per_class=1)
    else:
        for path in (images / "class_1").iterdir():
            path.unlink()
        (images / "class_1").rmdir()
    fresh = load_or_build_index(images, "off")
    index = load_or_build_index(images)
    assert list(index.paths) == list(fresh.paths)
    assert index.class_names == fresh.class_names


def test_folders_still_changing_are_not_cached(tmp_path: Path, cache_folder: Path) -> None:
    write_image_folder(tmp_path / "new", classes=1)
    load_or_build_index(tmp_path / "new")
    assert not (cache_folder / "image_folder").exists()


def test_a_damaged_cache_is_replaced_with_a_warning(
    images: Path, cache_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_or_build_index(images)
    (file,) = (cache_folder / "image_folder").iterdir()
    for damage in (b"", b"rubbish", file.read_bytes()[:200]):
        file.write_bytes(damage)
        with caplog.at_level(logging.WARNING, "dinov3"):
            assert len(load_or_build_index(images)) == 6
        assert "which can't be read" in caplog.text
        caplog.clear()
    assert len(load_or_build_index(images)) == 6
    assert not caplog.records


def test_a_cache_that_cannot_be_written_is_no_error(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").touch()
    with caplog.at_level(logging.INFO, "dinov3"):
        assert len(load_or_build_index(images, tmp_path / "a file")) == 6
    assert "can't be cached" in caplog.text


def test_the_cache_can_be_switched_off_or_put_elsewhere(images: Path, tmp_path: Path, cache_folder: Path) -> None:
    load_or_build_index(images, "off")
    load_or_build_index(images, tmp_path / "mine")
    assert not (cache_folder / "image_folder").exists()
    assert len(list((tmp_path / "mine").iterdir())) == 1


def test_the_default_place_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV3_CACHE", "/a")
    assert cache_folder("image_folder") == Path("/a/image_folder")
    monkeypatch.delenv("DINOV3_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder("image_folder") == Path("/b/dinov3/image_folder")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("image_folder") == Path.home() / ".cache/dinov3/image_folder"
