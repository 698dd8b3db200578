"""Meters that smooth a series of values, and the logger that prints and stores them while a loop runs.

Values may be tensors on a device: meters keep them as they are and transfer all of them at once when somebody reads a
meter (at a log line), so that nothing on the way waits for the device.
"""

import ctypes
import json
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3 import distributed
from dinov3.distributed.torch_distributed_primitives import communication_device
from dinov3.logging.memory import memory_mib
from dinov3.logging.progress import progress_bar
from dinov3.logging.sinks import JsonLinesSink, Sink

logger = logging.getLogger("dinov3")

T = TypeVar("T")

_MAX_PENDING = 10_000


class SmoothedValue:
    """A series of values: statistics of the newest `window_size`, and the average of all.

    Args:
        window_size: number of newest values that `median`, `avg` and `max` see.
        fmt: how `str` shows it, from `median`, `avg`, `global_avg`, `max` and `value`.
    """

    def __init__(self, window_size: int = 20, fmt: str = "{median:.4f} ({global_avg:.4f})") -> None:
        self.fmt = fmt
        self._window: deque[float] = deque(maxlen=window_size)
        self._count = 0
        self._total = 0.0
        self._pending: list[tuple[float | Tensor, int]] = []

    def update(self, value: float | Tensor, num: int = 1) -> None:
        """Append `value`, once; it stands for `num` values of the global average.

        Args:
            value: a number, or a tensor of one element. A tensor isn't waited for.
            num: its weight.
        """
        self._pending.append((value.detach().clone() if isinstance(value, Tensor) else value, num))
        if len(self._pending) >= _MAX_PENDING:
            settle([self])

    def _settle(self, values: Iterable[float]) -> None:
        for value, (_, num) in zip(values, self._pending, strict=True):
            self._window.append(value)
            self._count += num
            self._total += value * num
        self._pending = []

    @property
    def deque(self) -> "deque[float]":
        """The newest values."""
        settle([self])
        return self._window

    @property
    def count(self) -> int:
        """Sum of the weights of all values."""
        settle([self])
        return self._count

    @property
    def total(self) -> float:
        """Weighted sum of all values."""
        settle([self])
        return self._total

    @property
    def median(self) -> float:
        """Median of the window in float32; of an even number of values the lower of the two in the middle."""
        window = self.deque
        return _float32(_lower_median(window)) if window else math.nan

    @property
    def avg(self) -> float:
        """Mean of the window in float32."""
        window = self.deque
        return _float32(math.fsum(window) / len(window)) if window else math.nan

    @property
    def global_avg(self) -> float:
        """Weighted mean of all values."""
        return self.total / self.count if self.count else math.nan

    @property
    def max(self) -> float:
        """Largest value of the window."""
        return max(self.deque, default=math.nan)

    @property
    def value(self) -> float:
        """The newest value."""
        window = self.deque
        return window[-1] if window else math.nan

    def synchronize_between_processes(self) -> None:
        """Sum count and total over the world: `global_avg` becomes that of all processes, windows stay as they are."""
        synchronize([self])

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which `load_state_dict` restores the series."""
        return {"window": list(self.deque), "count": self.count, "total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a series that was saved."""
        self._pending = []
        self._window.clear()
        self._window.extend(state["window"])
        self._count, self._total = state["count"], state["total"]

    def __str__(self) -> str:
        return self.fmt.format(
            median=self.median, avg=self.avg, global_avg=self.global_avg, max=self.max, value=self.value
        )


def settle(meters: Iterable[SmoothedValue]) -> None:
    """Turn the tensors that meters hold into numbers, with one transfer per device."""
    meters = [meter for meter in meters if meter._pending]
    values = to_floats([value for meter in meters for value, _ in meter._pending])
    at = 0
    for meter in meters:
        n = len(meter._pending)
        meter._settle(values[at : at + n])
        at += n


def to_floats(values: Sequence[float | Tensor]) -> list[float]:
    """Numbers and one-element tensors as Python floats, with one transfer per device."""
    by_device: dict[torch.device, list[int]] = {}
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, []).append(i)
    floats = [math.nan if isinstance(value, Tensor) else float(value) for value in values]
    for device, places in by_device.items():
        wide = torch.float32 if device.type == "mps" else torch.float64
        stacked = torch.stack([values[i].reshape(()).to(wide) for i in places])  # type: ignore[union-attr]
        for i, number in zip(places, stacked.tolist(), strict=True):
            floats[i] = number
    return floats


def synchronize(meters: Sequence[SmoothedValue]) -> None:
    """Sum count and total of meters over the world, in one collective; all processes bring the same meters."""
    if distributed.get_world_size() == 1 or not meters:
        return
    device = communication_device()
    wide = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.tensor([[meter.count, meter.total] for meter in meters], dtype=wide, device=device)
    dist.all_reduce(sums)
    for meter, (count, total) in zip(meters, sums.tolist(), strict=True):
        meter._count, meter._total = int(count), total


class MetricLogger:
    """Meters by name, readable as attributes, and a loop that logs them.

    Args:
        delimiter: between the parts of a log line.
        output_file: JSON lines, one record per log line, appended by the main process of the subgroup; None: no file.
        sinks: further takers of the records.
    """

    def __init__(
        self, delimiter: str = "\t", output_file: str | Path | None = None, sinks: Sequence[Sink] = ()
    ) -> None:
        self.delimiter = delimiter
        self.output_file = output_file
        self.meters: dict[str, SmoothedValue] = {}
        self._file = None if output_file is None else JsonLinesSink(output_file)
        self.sinks: list[Sink] = [*([] if self._file is None else [self._file]), *sinks]
        self._unrecorded: Callable[[], None] | None = None

    def update(self, **kwargs: Any) -> None:
        """Append one value to each of the named meters, which are made as needed.

        Raises:
            TypeError: neither a number nor a tensor.
            ValueError: a tensor of more than one element.
        """
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise ValueError(f"metric {name!r} must be one number, got a tensor of shape {tuple(value.shape)}")
            elif not isinstance(value, Real):
                raise TypeError(f"metric {name!r} must be a number or a tensor, got {type(value).__name__}")
            self.meters.setdefault(name, SmoothedValue()).update(value)

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Use `meter` under `name`."""
        self.meters[name] = meter

    def __getattr__(self, name: str) -> SmoothedValue:
        meters: dict[str, SmoothedValue] = self.__dict__.get("meters", {})
        if name in meters:
            return meters[name]
        raise AttributeError(f"{type(self).__name__} has no attribute or meter {name!r}")

    def __str__(self) -> str:
        settle(self.meters.values())
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def synchronize_between_processes(self) -> None:
        """Make the global averages those of all processes."""
        synchronize(list(self.meters.values()))

    def state_dict(self) -> dict[str, str]:
        """The series of all meters, as one string: a checkpoint needs no knowledge of the names in it."""
        settle(self.meters.values())
        return {"meters": json.dumps({name: meter.state_dict() for name, meter in self.meters.items()})}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Continue the series that were saved."""
        for name, saved in json.loads(state["meters"]).items():
            self.meters.setdefault(name, SmoothedValue()).load_state_dict(saved)

    def log_every(
        self,
        iterable: Iterable[T],
        print_freq: int,
        header: str | None = None,
        n_iterations: int | None = None,
        start_iteration: int = 0,
        images_per_iteration: float | None = None,
    ) -> Iterator[T]:
        """Hand on the items of `iterable`; every `print_freq` iterations and after the last, log and store the meters.

        A record is made after the caller's work for an item (or at its end, by `record_now`): `iteration`, `iter_time`
        and `data_time` (means of the last 20, in seconds), the median of each meter, then `images_per_second` if the
        batch size is known. The log line also has the time that is left, the share of the time that was spent waiting
        for data, and the memory.

        Args:
            iterable: not asked for more items than are needed.
            print_freq: iterations between log lines.
            header: first part of a line.
            n_iterations: index at which to stop; default: the length of the iterable, or its end.
            start_iteration: index of the first item.
            images_per_iteration: of all processes; default: what the meter `global_batch_size` says, if there is one.
        """
        if n_iterations is None:
            n_iterations = len(iterable) if hasattr(iterable, "__len__") else None  # type: ignore[arg-type]
        header = header or ""
        iter_time, data_time = SmoothedValue(fmt="{avg:.4f}"), SmoothedValue(fmt="{avg:.4f}")
        begin = end = time.perf_counter()
        i = start_iteration
        items = iter(iterable)

        def record() -> None:
            iter_time.update(time.perf_counter() - end)
            if i % print_freq == 0 or i + 1 == n_iterations:
                settle(self.meters.values())
                speed = self._images_per_second(iter_time, images_per_iteration)
                self._store(i, iter_time, data_time, speed)
                logger.info(self._line(header, i, n_iterations, iter_time, data_time, speed))

        with progress_bar(n_iterations, start_iteration, header) as bar:
            while n_iterations is None or i < n_iterations:
                try:
                    item = next(items)
                except StopIteration:
                    break
                data_time.update(time.perf_counter() - end)
                self._unrecorded = record
                yield item
                self.record_now()
                bar.update()
                i += 1
                end = time.perf_counter()
        seconds, done = time.perf_counter() - begin, i - start_iteration
        per_iteration = f"{seconds / done:.6f} s / it" if done else "nothing to do"
        logger.info("%s Total time: %s (%s)", header, timedelta(seconds=int(seconds)), per_iteration)

    def record_now(self) -> None:
        """Make the record of the item that `log_every` has handed out, if one is due, before the next is asked for.

        For callers that then save their state: a record that comes later is lost if the process ends in between.
        """
        record, self._unrecorded = self._unrecorded, None
        if record is not None:
            record()

    def flush(self) -> None:
        """Store the records that could not be stored before, if it is possible now."""
        if self._file is not None:
            self._file.flush()

    def _images_per_second(self, iter_time: SmoothedValue, images_per_iteration: float | None) -> float | None:
        if images_per_iteration is None and "global_batch_size" in self.meters:
            images_per_iteration = self.meters["global_batch_size"].value
        return None if images_per_iteration is None else images_per_iteration / max(iter_time.avg, 1e-9)

    def _store(self, iteration: int, iter_time: SmoothedValue, data_time: SmoothedValue, speed: float | None) -> None:
        if not self.sinks or not distributed.is_subgroup_main_process():
            return
        record = {"iteration": iteration, "iter_time": iter_time.avg, "data_time": data_time.avg}
        record |= {name: meter.median for name, meter in self.meters.items()}
        if speed is not None:
            record["images_per_second"] = speed
        for sink in self.sinks:
            sink.write(record)

    def _line(
        self,
        header: str,
        i: int,
        n: int | None,
        iter_time: SmoothedValue,
        data_time: SmoothedValue,
        speed: float | None,
    ) -> str:
        parts = [header, f"[{i:{len(str(n))}d}/{n}]" if n is not None else f"[{i}]"]
        if n is not None:
            parts.append(f"eta: {timedelta(seconds=int(iter_time.global_avg * (n - i - 1)))}")
        parts += [str(self)] if self.meters else []
        parts += [f"time: {iter_time}", f"data: {data_time}"]
        if (memory := memory_mib()) is not None:
            parts.append(f"mem: {memory[0]:.0f} (max mem: {memory[1]:.0f})")
        if speed is not None:
            parts.append(f"images/s: {speed:.4g}")
        parts.append(f"data wait: {data_time.avg / max(iter_time.avg, 1e-9):.0%}")
        return self.delimiter.join(parts)


def _lower_median(values: Iterable[float]) -> float:
    values = list(values)
    # Sorting puts NaN anywhere; a series with a NaN has no median.
    return math.nan if any(math.isnan(value) for value in values) else statistics.median_low(values)


def _float32(value: float) -> float:
    return ctypes.c_float(value).value
