import json
import math
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov3.logging import MetricLogger, SmoothedValue
from dinov3.logging import helpers as helpers_module
from tests.helpers.distributed import run_distributed


def test_empty_meter_has_no_statistics() -> None:
    meter = SmoothedValue()
    assert all(math.isnan(v) for v in (meter.median, meter.avg, meter.global_avg, meter.max, meter.value))
    assert str(meter) == "nan (nan)"


def test_window_and_global_statistics() -> None:
    meter = SmoothedValue(window_size=3)
    for value in (10.0, 1.0, 3.0, 2.0):
        meter.update(value)
    meter.update(5.0, num=6)
    assert (meter.median, meter.max, meter.value) == (3.0, 5.0, 5.0)
    assert meter.avg == pytest.approx(10 / 3)
    assert meter.global_avg == pytest.approx((16 + 30) / 10)
    meter = SmoothedValue()
    for value in (1.0, 2.0, 3.0, 4.0):
        meter.update(value)
    assert meter.median == 2.0  # the lower of two


def test_nan_in_the_window_makes_the_median_nan() -> None:
    meter = SmoothedValue()
    for value in (1.0, math.nan, 0.5):
        meter.update(value)
    assert math.isnan(meter.median)


def test_tensors_are_transferred_once_per_log_line(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers: list[int] = []
    original = helpers_module.to_floats

    def counting(values: list[float | torch.Tensor]) -> list[float]:
        transfers.extend([len(values)] if any(isinstance(value, torch.Tensor) for value in values) else [])
        return original(values)

    monkeypatch.setattr(helpers_module, "to_floats", counting)
    metrics = MetricLogger()
    source = torch.zeros(())
    for i in metrics.log_every(range(5), print_freq=100, n_iterations=6, start_iteration=1):
        source.fill_(i)  # in place: what was logged before must not change
        metrics.update(loss=source, lr=0.5 * i)
        if i < 4:
            assert transfers == []
    assert transfers == [10]
    assert list(metrics.loss.deque) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert list(metrics.lr.deque) == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_dtypes_and_kinds_of_numbers() -> None:
    metrics = MetricLogger()
    metrics.update(a=torch.tensor(3), b=torch.tensor([0.5], dtype=torch.bfloat16), c=np.float32(0.25), d=7, e=True)
    assert [metrics.meters[k].value for k in "abcde"] == [3.0, 0.5, 0.25, 7.0, 1.0]


def test_values_that_are_no_number_are_refused() -> None:
    metrics = MetricLogger()
    with pytest.raises(TypeError, match="'loss' must be a number or a tensor, got str"):
        metrics.update(loss="0.5")
    with pytest.raises(ValueError, match=r"'loss' must be one number, got a tensor of shape \(2,\)"):
        metrics.update(loss=torch.zeros(2))
    with pytest.raises(AttributeError, match="nothing"):
        _ = metrics.nothing


def test_state_continues_a_series() -> None:
    first, second, whole = MetricLogger(), MetricLogger(), MetricLogger()
    values = torch.rand(50).tolist()
    for i, value in enumerate(values):
        (first if i < 30 else second).update(loss=value)
        whole.update(loss=value)
        if i == 29:
            second.load_state_dict(first.state_dict())
    assert second.loss.state_dict() == whole.loss.state_dict()


def _synchronize() -> tuple[float, float]:
    rank = torch.distributed.get_rank()
    metrics, alone = MetricLogger(), SmoothedValue()
    for i in range(rank + 1):
        metrics.update(x=torch.tensor(float(rank)))
        alone.update(i)
    metrics.synchronize_between_processes()
    alone.synchronize_between_processes()
    return metrics.x.global_avg, alone.global_avg


def test_synchronize_averages_over_processes(tmp_path: Path) -> None:
    assert run_distributed(_synchronize, 2, tmp_path) == [(2 / 3, 1 / 3)] * 2


def test_log_every_stops_without_asking_for_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    def items() -> "object":
        for i in range(100):
            asked.append(i)
            yield i

    output = tmp_path / "metrics.json"
    metrics = MetricLogger(delimiter="  ", output_file=output)
    seen = []
    with caplog.at_level("INFO", logger="dinov3"):
        for item in metrics.log_every(items(), 4, header="Test", n_iterations=13, start_iteration=7):
            seen.append(item)
            metrics.update(loss=float(item), global_batch_size=32)
    assert seen == asked == list(range(6))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [8, 12]
    assert list(rows[0]) == ["iteration", "iter_time", "data_time", "loss", "global_batch_size", "images_per_second"]
    assert [row["loss"] for row in rows] == [0.0, 2.0]  # after the work for the item
    *lines, total = caplog.messages
    assert len(lines) == 2
    for part in ("Test  [ 8/13]", "eta: ", "loss: ", "time: ", "data: ", "mem: ", "images/s: ", "data wait: "):
        assert part in lines[0], lines[0]
    assert total.startswith("Test Total time: 0:00:00 (")


def test_log_every_of_something_without_a_length() -> None:
    metrics = MetricLogger()
    assert list(metrics.log_every(iter("abc"), print_freq=2)) == ["a", "b", "c"]
    assert list(metrics.log_every("abc", print_freq=2)) == ["a", "b", "c"]
    assert list(metrics.log_every("abc", print_freq=2, n_iterations=5, start_iteration=5)) == []


def test_records_that_cannot_be_stored_wait_until_they_can(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "missing"
    metrics = MetricLogger(output_file=folder / "metrics.json")
    for i in metrics.log_every(range(4), 1):
        if i == 2:
            assert "2 lines wait" in caplog.text
            folder.mkdir()
    rows = [json.loads(line)["iteration"] for line in (folder / "metrics.json").read_text().splitlines()]
    assert rows == [0, 1, 2, 3]


def _write_until_full(path: Path) -> str:
    metrics = MetricLogger(output_file=path)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for i in metrics.log_every(range(30), 1):
        if i == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, resource.RLIM_INFINITY))
        if i == 25:
            assert path.read_text().endswith("}\n"), "half a line"
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return path.read_text()


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    (text,) = run_distributed(_write_until_full, 1, tmp_path, tmp_path / "metrics.json", init_group=False)
    assert [json.loads(line)["iteration"] for line in text.splitlines()] == list(range(30))


def test_a_record_can_be_made_before_the_next_item_is_asked_for(tmp_path: Path) -> None:
    output = tmp_path / "metrics.json"
    metrics = MetricLogger(output_file=output)
    for i in metrics.log_every(range(3), 2):
        metrics.update(loss=float(i))
        metrics.record_now()
        metrics.record_now()
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert rows[-1]["iteration"] == i - i % 2
    assert [(row["iteration"], row["loss"]) for row in rows] == [(0, 0.0), (2, 1.0)]


class _Terminal:
    """Stands in for a terminal."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.written.append(text)
        return len(text)

    def flush(self) -> None:
        pass


def test_progress_bar_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(MetricLogger().log_every(range(3), 10, header="Train")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    terminal = _Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert list(MetricLogger().log_every(range(3), 10, header="Train")) == [0, 1, 2]
    assert "Train" in "".join(terminal.written)
