"""What a benchmark is given: it measures points and keeps their rows."""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.frame import machine
from benchmarks.frame.measure import Maker, peak_memory, synchronize, time_in_turns
from benchmarks.frame.results import Row, merge, read_rows, summarise, write_rows


class Bench:
    """Measures points in turns; each row is printed and merged into the results at once.

    The first entry of `makers` is called "ours", the others by their names; the ratio is against the best of them.
    """

    limit_s = 20.0
    """Points whose call takes longer than this are left out."""

    def __init__(
        self,
        out: Path,
        command: str,
        *,
        device: torch.device,
        threads: int,
        seconds: float = 8.0,
        quick: bool = False,
        only: Sequence[str] = (),
        new: bool = False,
    ) -> None:
        self.out, self.command = out, command
        self.device, self.threads = device, threads
        self.quick = quick
        self.seconds = min(seconds, 0.5) if quick else seconds
        self._only, self._new = only, new
        self._machine = machine.describe_machine(device, threads)
        self._versions = machine.versions()

    def wants(self, name: str) -> bool:
        """Whether the point is to be measured in this run."""
        if self._only and not any(text in name for text in self._only):
            return False
        return not (self._new and self.known(name) is not None)

    def known(self, name: str) -> Row | None:
        """The row of that name from this device and machine, of this run or an earlier one."""
        key = (name, self.device.type, self._machine)
        return next((row for row in read_rows(self.out) if row.key == key), None)

    def time(
        self,
        name: str,
        makers: Mapping[str, Maker],
        *,
        table: str,
        target: float | Callable[[], float] | None = None,
        items: int | None = None,
        expected_s: float | None = None,
        rounds: tuple[int, int] = (5, 100),
        before: Callable[[int], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        **labels: Any,
    ) -> Row | None:
        """Milliseconds of each side, or images/s.

        Args:
            name: of the row; it belongs to this point alone.
            makers: functions that build what is needed and return the function to measure; "ours" is one of them.
            table: the row stands in.
            target: the ratio that is wanted, or what finds it if the point is measured.
            items: images that one call takes: the row says images/s then, not ms.
            expected_s: of one call, if known beforehand.
            rounds: fewest (at most 3 if a call takes more than 4 s) and most; within them, as many as fit in `seconds`.
            before: see `time_in_turns`, as is `clock`.
            labels: further fields of the row: `series`, `x`.

        Returns:
            The row; None if the point is not wanted, or takes more than `limit_s` for one call.
        """
        if not self.wants(name):
            return None
        if expected_s is not None and expected_s > self.limit_s:
            self._skip(name, expected_s)
            return None
        calls = {label: maker() for label, maker in makers.items()}
        if before is not None:
            before(0)
        start = time.perf_counter()
        calls["ours"]()
        synchronize(self.device)
        first_s = time.perf_counter() - start
        if first_s > 1.5 * self.limit_s:  # a first call is slower than others
            self._skip(name, first_s)
            return None
        times = time_in_turns(
            calls,
            device=self.device,
            seconds=self.seconds,
            rounds=(2, 3) if self.quick else (min(rounds[0], 3) if first_s > 4 else rounds[0], rounds[1]),
            before=before,
            clock=clock,
        )
        if callable(target):
            target = target()
        if items is None:
            values = {label: [1e3 * t for t in taken] for label, taken in times.items()}
            return self._keep(name, table, target, "ms", values, **labels)
        values = {label: [items / t for t in taken] for label, taken in times.items()}
        return self._keep(name, table, target, "images/s", values, **labels)

    def memory(
        self, name: str, makers: Mapping[str, Maker], *, table: str, target: float | None = None, **labels: Any
    ) -> Row | None:
        """Megabytes that one call takes at most beyond the resting state, each side in a process of its own.

        `makers` are functions of a module, or `functools.partial`s of such.
        """
        if not self.wants(name):
            return None
        peaks = {label: [peak_memory(maker, self.device, self.threads) / 1e6] for label, maker in makers.items()}
        return self._keep(name, table, target, "MB", peaks, **labels)

    def record(
        self,
        name: str,
        values: Mapping[str, Sequence[float]],
        *,
        table: str,
        unit: str,
        target: float | None = None,
        **labels: Any,
    ) -> Row:
        """Keep what the benchmark has measured itself: values of "ours" and of alternatives, one for each round."""
        return self._keep(name, table, target, unit, values, **labels)

    def _keep(
        self,
        name: str,
        table: str,
        target: float | None,
        unit: str,
        values: Mapping[str, Sequence[float]],
        **labels: Any,
    ) -> Row:
        row = Row(
            name=name,
            table=table,
            target=target,
            unit=unit,
            device=self.device.type,
            machine=self._machine,
            versions=self._versions,
            command=self.command,
            date=date.today().isoformat(),
            **summarise(values, unit),
            **labels,
        )
        write_rows(self.out, merge(read_rows(self.out), [row]))
        if row.ratio is None:
            print(f"  {name}: {row.ours:.4g} {unit}", flush=True)
        else:
            wanted = "" if target is None else f" (wanted {target:g})"
            spread = "" if row.spread is None else " [{:.2f}, {:.2f}]".format(*row.spread)
            both = f"{row.ours:.4g} {unit}, {row.alternative} {row.theirs:.4g}"
            print(f"  {name}: {both}: ratio {row.ratio:.2f}{spread}{wanted}", flush=True)
        return row

    def _skip(self, name: str, seconds: float) -> None:
        print(f"  {name}: left out, {seconds:.0f} s a call", flush=True)
