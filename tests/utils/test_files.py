"""Files that appear whole or not at all."""

from pathlib import Path

import pytest

from dinov3.utils.files import atomically


def test_the_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    for text in ("one", "two"):
        with atomically(path) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail() -> None:
        with atomically(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


def test_what_a_writer_that_was_killed_has_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    (tmp_path / ".file.txt.tmp").mkdir()
    (tmp_path / ".file.txt.tmp" / "of_a_library").write_text("rest")
    (tmp_path / ".other.txt.tmp").write_text("rest")
    for name in ("file.txt", "other.txt"):
        with atomically(tmp_path / name) as temporary:
            temporary.write_text("new")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file.txt", "other.txt"]
    assert path.read_text() == "new"
