"""What the suite has done: counted as it goes, printed at its end (`conftest.py`) and kept in docs/reliability.md."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

injected: Counter[str] = Counter()
starts_s: list[float] = []


def fault(kind: str, n: int = 1) -> None:
    """Note that something was broken on purpose."""
    injected[kind] += n


@contextmanager
def start_of_a_job() -> Iterator[None]:
    """Measure how long a job takes from its start to its first iteration."""
    begin = time.monotonic()
    yield
    starts_s.append(time.monotonic() - begin)


def report() -> list[str]:
    """Lines of a Markdown table; empty if nothing was injected."""
    if not injected:
        return []
    lines = ["| fault | times |", "|---|---|", *(f"| {kind} | {n} |" for kind, n in sorted(injected.items()))]
    lines.append(f"| all | {sum(injected.values())} |")
    if starts_s:
        middle = sorted(starts_s)[len(starts_s) // 2]
        lines.append(
            f"{len(starts_s)} starts of a training took {middle:.1f} s (median), {max(starts_s):.1f} s (longest)"
        )
    return lines
