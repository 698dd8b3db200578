"""`--dry-run` and `--find-batch`: what they tell, that they leave nothing behind, and the search for the batch."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from dinov3.train import dry_run
from dinov3.train.dry_run import largest_that_fits
from dinov3.train.train import main, parse_args
from tests.helpers import tiny_training
from tests.helpers.tiny_training import with_output


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_training.prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def report(caplog: pytest.LogCaptureFixture, arguments: list[str], tmp_path: Path) -> "Report":
    caplog.set_level(logging.INFO, logger="dinov3")
    return Report(caplog, arguments, tmp_path / "out")


class Report:
    """What a dry run logs."""

    def __init__(self, caplog: pytest.LogCaptureFixture, arguments: list[str], output_dir: Path) -> None:
        self.caplog, self.arguments, self.output_dir = caplog, arguments, output_dir

    def __call__(self, flags: Sequence[str] = ("--dry-run",), *overrides: str) -> str:
        main([*flags, *with_output(self.arguments, self.output_dir, *overrides)])
        return "\n".join(record.getMessage() for record in self.caplog.records)


def test_it_tells_what_a_training_needs_and_leaves_nothing_behind(report: Report) -> None:
    text = report()
    for title in ("parameters", "memory", "speed", "schedule", "reads", "writes"):
        assert re.search(rf"^{title}:$", text, re.MULTILINE), title
    assert re.search(r"student backbone: 5,376$", text, re.MULTILINE)
    assert re.search(r"EMA teacher: 8,016$", text, re.MULTILINE)
    assert re.search(r"[\d.]+ images/s: [\d.]+ s for a step of 4 images on ", text)
    assert "15 iterations of 4 images in 3 epochs" in text
    # The highest learning rate, at the end of the warm-up; scaled: 4 * sqrt(4 / 1024) * 1e-3.
    assert re.search(r"^ +4 +0\.00025 ", text, re.MULTILINE)
    assert f"{report.output_dir}/ckpt/<iteration>/ every 4 iterations" in text
    assert "checkpoint: none, training starts from its initial weights" in text
    assert "MISSING" not in text
    assert not report.output_dir.exists()


def test_data_that_are_not_there_are_named_and_nothing_stops(report: Report) -> None:
    report.arguments = [*report.arguments[:2], "train.dataset_path=ImageFolder:root=/nowhere"]
    assert "MISSING: root of ImageFolder: /nowhere" in report()


def test_it_checks_the_configuration(report: Report) -> None:
    with pytest.raises(ValueError, match="did you mean student.arch"):
        report(("--dry-run",), "student.arhc=vit_large")


def test_several_students_are_refused(report: Report) -> None:
    with pytest.raises(ValueError, match="--dry-run is for one student"):
        report(("--dry-run", "--multi-distillation"))


def test_find_batch_ends_with_a_setting(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "_MAX_BATCH", 8)
    text = report(("--find-batch",), "train.gradient_accumulation=2")
    assert [int(n) for n in re.findall(r"a batch of (\d+)", text)] == [2, 4, 8]  # multiples of the parts
    assert re.search(r"largest batch that fits: (train.batch_size_per_gpu=\d+ \(extrapolated|8 or more)", text)


@pytest.mark.parametrize("granularity", [1, 3])
@pytest.mark.parametrize("limit", [1, 2, 50, 64])
def test_the_search_finds_the_largest_batch(granularity: int, limit: int) -> None:
    for capacity in range(80):
        tried: list[int] = []

        def fits(size: int, capacity: int = capacity, tried: list[int] = tried) -> bool:
            tried.append(size)
            return size <= capacity

        expected = min(limit, capacity) // granularity * granularity
        assert largest_that_fits(fits, granularity, limit) == expected
        assert len(tried) == len(set(tried)) <= 14
        assert all(size % granularity == 0 for size in tried)


def test_options_after_overrides_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["train.seed=1", "--dry-run"])
    assert "options must come before" in capsys.readouterr().err
