import os
from pathlib import Path

import pytest

from dinov3.checkpointer import (
    CheckpointRetentionPolicy,
    cleanup_checkpoint,
    directories,
    find_all_checkpoints,
    find_latest_checkpoint,
    keep_checkpoint_copy,
    keep_last_n_checkpoints,
    save_checkpoint,
)
from dinov3.checkpointer.directories import set_aside_damaged
from tests.checkpointer.toy import build


def make(folder: Path, *names: str) -> None:
    arch, _ = build(0)
    for name in names:
        save_checkpoint(folder / name, iteration=0, model=arch)


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_only_names_of_digits_are_checkpoints(tmp_path: Path) -> None:
    for name in ("7", "12", "1_0", " 7", "-1", "٣", "+5", "007x", ".saving-9"):
        (tmp_path / name).mkdir()
    (tmp_path / "99").write_text("a file")
    assert names(find_all_checkpoints(tmp_path)) == ["7", "12"]
    assert find_all_checkpoints(tmp_path / "nowhere") == []
    assert find_latest_checkpoint(tmp_path / "nowhere") is None


def test_unfinished_and_damaged_checkpoints_are_skipped_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "1", "2", "3", "4", "5")
    (tmp_path / "2" / ".metadata").rename(tmp_path / "2" / ".metadata.tmp")
    data = tmp_path / "3" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-100])
    (tmp_path / "4" / ".metadata").write_bytes((tmp_path / "4" / ".metadata").read_bytes()[:200])
    (tmp_path / "5" / "__0_0.distcp").unlink()
    (tmp_path / "6").mkdir()
    latest = find_latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "1"
    reasons = {"6": "empty", "5": "missing", "4": "damaged", "3": "cut off", "2": "not finished"}
    messages = [record.getMessage() for record in caplog.records if record.name == "dinov3"]
    skipped = [message for message in messages if message.startswith("skipping")]
    for message, (name, reason) in zip(skipped, reasons.items(), strict=True):
        assert f"{tmp_path / name}:" in message
        assert reason in message


def test_damaged_checkpoints_do_not_count_among_the_newest(tmp_path: Path) -> None:
    make(tmp_path, "1", "2", "3")
    (tmp_path / "3" / ".metadata").unlink()
    set_aside_damaged(tmp_path, find_latest_checkpoint(tmp_path))
    keep_last_n_checkpoints(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3_damaged"]
    (tmp_path / "2" / ".metadata").unlink()
    set_aside_damaged(tmp_path, None)
    assert find_all_checkpoints(tmp_path) == []
    set_aside_damaged(tmp_path / "nowhere", None)


def test_a_replaced_checkpoint_stands_in_until_the_new_one_is_there(tmp_path: Path) -> None:
    make(tmp_path, "1", "5")
    (tmp_path / "5").rename(tmp_path / ".replaced-5")
    (tmp_path / ".saving-5").mkdir()
    assert find_latest_checkpoint(tmp_path) == tmp_path / ".replaced-5"
    make(tmp_path, "6")  # the next save tidies up
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "5", "6"]
    make(tmp_path, "7")
    (tmp_path / ".replaced-7").mkdir()
    assert find_latest_checkpoint(tmp_path) == tmp_path / "7"


def test_keep_last_n(tmp_path: Path) -> None:
    for name in ("1", "3", "20", "3_keep", "best"):
        (tmp_path / name).mkdir()
    keep_last_n_checkpoints(tmp_path, None)
    assert names(find_all_checkpoints(tmp_path)) == ["1", "3", "20"]
    keep_last_n_checkpoints(tmp_path, 5)  # more than there are
    assert names(find_all_checkpoints(tmp_path)) == ["1", "3", "20"]
    keep_last_n_checkpoints(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["20", "3", "3_keep", "best"]
    keep_last_n_checkpoints(tmp_path, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3_keep", "best"]
    with pytest.raises(ValueError, match="-1"):
        keep_last_n_checkpoints(tmp_path, -1)


def test_failures_to_delete_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1").mkdir()

    def refuse(path: Path) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(directories, "_delete", refuse)
    keep_last_n_checkpoints(tmp_path, 0)
    assert any("could not delete" in message and "not yours" in message for message in caplog.messages)


def test_kept_copy_shares_files_and_is_replaced(tmp_path: Path) -> None:
    make(tmp_path, "9")
    keep_checkpoint_copy(tmp_path / "9")
    make(tmp_path, "9")
    keep_checkpoint_copy(tmp_path / "9")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["9", "9_keep"]
    for name in (".metadata", "__0_0.distcp"):
        assert (tmp_path / "9" / name).samefile(tmp_path / "9_keep" / name)
    keep_last_n_checkpoints(tmp_path, 0)
    assert directories.checkpoint_problem(tmp_path / "9_keep") is None


def test_copies_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "9")

    def no_links(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    keep_checkpoint_copy(tmp_path / "9")
    assert directories.checkpoint_problem(tmp_path / "9_keep") is None


@pytest.mark.parametrize(
    ("policy", "left", "max_to_keep"),
    [
        ("all", {"1", "2", "best", "final"}, None),
        ("best", {"best"}, 1),
        ("last", {"final"}, 1),
        ("last_and_best", {"best", "final"}, 1),
        ("none", set(), 1),
    ],
)
def test_retention(tmp_path: Path, policy: str, left: set[str], max_to_keep: int | None) -> None:
    for name in ("1", "2", "best", "final"):
        (tmp_path / name).mkdir()
    (tmp_path / "results.json").write_text("{}")
    retention = CheckpointRetentionPolicy(policy)
    assert retention.max_to_keep == max_to_keep
    cleanup_checkpoint(tmp_path, retention)
    assert {p.name for p in tmp_path.iterdir()} == left | {"results.json"}
    cleanup_checkpoint(tmp_path / "nowhere", retention)
