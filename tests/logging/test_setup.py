import contextlib
import io
import logging
import re
import resource
import signal
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov3.logging import cleanup_logging, setup_logging
from tests.helpers.distributed import run_distributed

LINE = re.compile(r"^([DIWEC])\d{8} \d\d:\d\d:\d\d \d+ (\S+) (\S+):(\d+)\] (.*)$")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    level = logging.getLogger().level
    logging.getLogger("dinov3").setLevel(logging.NOTSET)  # a command that ran before may have left its own
    yield
    cleanup_logging()
    cleanup_logging(name="some_logger")
    logging.getLogger().setLevel(level)
    assert not [h for h in logging.getLogger().handlers if type(h).__module__.startswith("dinov3")]


def test_lines_of_stdout_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path)
    logging.getLogger("dinov3").warning("hello %s", "there")
    (line,) = capsys.readouterr().out.splitlines()
    match = LINE.match(line)
    assert match, line
    assert match.groups() == ("W", "dinov3", "test_setup.py", match.group(4), "hello there")
    assert (tmp_path / "logs" / "log.txt").read_text() == line + "\n"


def test_repeating_the_call_adds_nothing_and_files_are_appended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        setup_logging(tmp_path / "run.log")
        setup_logging(tmp_path / "run.log")
        logging.getLogger("dinov3").info("once")
        cleanup_logging()
        logging.getLogger("dinov3").error("nobody listens")
    assert capsys.readouterr().out.count("once") == 2
    assert (tmp_path / "run.log").read_text().count("once") == 2
    assert "nobody" not in (tmp_path / "run.log").read_text()


def test_a_named_logger_keeps_its_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path / "all.txt")
    setup_logging(tmp_path / "own.txt", name="some_logger")
    logging.getLogger("some_logger").warning("mine")
    assert "mine" in (tmp_path / "own.txt").read_text()
    assert "mine" not in (tmp_path / "all.txt").read_text()
    assert capsys.readouterr().out.count("mine") == 1


def test_warnings_are_captured_and_chatty_libraries_quieted(tmp_path: Path) -> None:
    setup_logging(tmp_path / "log.txt")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)  # catch_warnings replaced what setup_logging had installed
        warnings.warn("be careful", stacklevel=1)
    logging.getLogger("PIL.PngImagePlugin").debug("a chunk")
    logging.getLogger("dinov3").debug("a detail")
    text = (tmp_path / "log.txt").read_text()
    assert "a detail" in text
    assert "a chunk" not in text


def test_colors_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    setup_logging()
    logging.getLogger("dinov3").info("plain")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    logging.getLogger("dinov3").info("colored")
    plain, colored = capsys.readouterr().out.splitlines()
    assert "\x1b" not in plain
    assert colored.startswith("\x1b[32mI")
    assert colored.endswith("]\x1b[0m colored")


def test_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="logs"):
        setup_logging(tmp_path)
    assert stat.S_ISREG((tmp_path / "logs").stat().st_mode)


def _log_from_every_rank(folder: Path) -> None:
    setup_logging(folder)
    logging.getLogger("dinov3").info("from rank %d", int(__import__("os").environ["RANK"]))
    cleanup_logging()


@pytest.mark.parametrize("init_group", [False, True])
def test_one_file_per_rank(tmp_path: Path, init_group: bool) -> None:
    run_distributed(_log_from_every_rank, 2, tmp_path, tmp_path / "out", init_group=init_group)
    files = {path.name: path.read_text() for path in (tmp_path / "out" / "logs").iterdir()}
    assert set(files) == {"log.txt", "log.txt.rank1"}
    assert "from rank 0" in files["log.txt"]
    assert "from rank 1" in files["log.txt.rank1"]


def _log_on_a_full_disk(folder: Path) -> str:
    setup_logging(output=str(folder), name="full")
    logger, log = logging.getLogger("full"), folder / "logs" / "log.txt"
    logger.info("before")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size, resource.RLIM_INFINITY))
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        logger.info("first lost")
        logger.info("second lost")
        cleanup_logging(name="full")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert log.read_text().endswith("before\n")
    return said.getvalue()


def test_a_full_disk_is_said_once(tmp_path: Path) -> None:
    (said,) = run_distributed(_log_on_a_full_disk, 1, tmp_path, tmp_path / "out", init_group=False)
    assert said.count("\n") == 1
    assert "lines of the log are missing from" in said
