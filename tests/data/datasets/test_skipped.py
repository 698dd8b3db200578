import gc
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from dinov3.data import DataAugmentationDINO, DatasetWithEnumeratedTargets, make_data_loader
from dinov3.data.datasets import ImageFolder, skipped
from dinov3.data.datasets.skipped import SkippedFiles
from tests.helpers.images import broken_images, odd_images, write_image_folder


def write_messy_folder(root: Path, n_fine: int = 30) -> set[str]:
    """Fine images among odd and broken ones; returns the broken ones."""
    write_image_folder(root / "fine", classes=0, per_class=n_fine)
    for kind, files in (("odd", odd_images()), ("broken", broken_images())):
        (root / kind).mkdir()
        for name, data in files.items():
            (root / kind / name).write_bytes(data)
    return {f"broken/{name}" for name in broken_images()}


@pytest.mark.parametrize("path", ["pil", "tensor", "device"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_messy_folder_is_loaded_and_the_report_names_what_was_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, path: str, workers: int
) -> None:
    broken = write_messy_folder(tmp_path / "images")
    augment = DataAugmentationDINO(
        (0.3, 1.0), (0.05, 0.3), 1, global_crops_size=16, local_crops_size=8, augmentation=path
    )
    dataset = ImageFolder(root=tmp_path / "images", transform=augment)
    dataset.skipped.move_to(tmp_path / "out" / "skipped.jsonl")
    loader = make_data_loader(dataset=dataset, batch_size=4, num_workers=workers, collate_fn=list, draw_seed=0)
    with caplog.at_level(logging.WARNING, "dinov3"):
        for _, batch in zip(range(2 * len(dataset) // 4), loader, strict=False):
            assert len(batch) == 4
        del batch
    gc.collect()
    report = SkippedFiles(tmp_path / "out" / "skipped.jsonl").read()
    assert set(report) == broken
    assert all(reason for reason in report.values())
    (message,) = [record.message for record in caplog.records if "can't be read so far" in record.message]
    assert message.startswith(f"{len(broken)} images can't be read so far")
    assert str(tmp_path / "out" / "skipped.jsonl") in message
    assert "broken/" in message


def test_an_evaluation_over_a_messy_folder_is_counted_through(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_messy_folder(tmp_path, n_fine=4)
    dataset = DatasetWithEnumeratedTargets(
        ImageFolder(root=tmp_path, transform=np.array), pad_dataset=True, num_replicas=4
    )
    loader = make_data_loader(
        dataset=dataset, batch_size=3, num_workers=0, shuffle=False, sampler_type=None, drop_last=False, collate_fn=list
    )
    with caplog.at_level(logging.WARNING, "dinov3"):
        assert sum(len(batch) for batch in loader) == len(dataset)
    assert dataset.skipped is not None
    assert len(dataset.skipped.read()) == len(broken_images())
    # Without a report that stays, the log names them all.
    (message,) = [record.message for record in caplog.records]
    assert all(f"broken/{name}" in message for name in broken_images())
    assert str(dataset.skipped.path) not in message


def test_copies_in_other_processes_write_to_the_same_report(tmp_path: Path) -> None:
    report = SkippedFiles()
    assert report.read() == {}
    assert not report.path.exists()
    assert report.add("a.jpg", "empty")
    copy = pickle.loads(pickle.dumps(report))
    assert not copy.add("a.jpg", "empty")
    assert copy.add("ü\n.jpg", "strange")
    assert report.read() == {"a.jpg": "empty", "ü\n.jpg": "strange"}
    temporary = report.path
    report.move_to(tmp_path / "new" / "report.jsonl")
    assert report.add("c.jpg", "late")
    assert list(SkippedFiles(tmp_path / "new" / "report.jsonl").read()) == ["a.jpg", "ü\n.jpg", "c.jpg"]
    del copy
    assert temporary.exists()  # the copy is not the owner
    del report
    assert not temporary.exists()


def test_an_unfinished_line_does_not_hide_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = SkippedFiles(tmp_path / "report.jsonl")
    report.add("a.jpg", "empty")
    with report.path.open("a") as file:
        file.write('{"file": "b.j')
    with caplog.at_level(logging.WARNING, "dinov3"):
        assert report.read() == {"a.jpg": "empty"}
    assert "isn't complete" in caplog.text


def test_log_lines_come_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(skipped.time, "monotonic", lambda: now[0])
    report = SkippedFiles(tmp_path / "report.jsonl")
    batches = skipped.ReportingIterator(iter(range(5)), report)

    def told() -> int:
        return sum("can't be read so far" in record.message for record in caplog.records)

    with caplog.at_level(logging.WARNING, "dinov3"):
        report.add("a", "x")
        next(batches)
        assert told() == 0
        now[0] = 31.0
        next(batches)
        assert told() == 1
        now[0] = 700.0
        next(batches)
        assert told() == 1  # nothing new
        report.add("b", "x")
        assert list(batches) == [3, 4]
        assert told() == 2
    assert "2 images can't be read so far" in caplog.text
    assert "New: b: x" in caplog.records[-1].message


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_list_in_the_folder_of_all_users_is_for_its_owner_alone() -> None:
    report = SkippedFiles()
    report.add("private.jpg", "why")
    assert report.path.stat().st_mode & 0o077 == 0
