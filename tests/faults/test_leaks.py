"""A long training needs no more memory, files, threads or processes than a short one, and leaves no process behind."""

import statistics
import time
from pathlib import Path

import pytest

from tests.faults.jobs import Training
from tests.helpers.processes import children_of, is_running

if not Path("/proc/self/status").exists():
    pytest.skip("needs Linux", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]

N_ITERATIONS = 10_000
MAX_GROWTH_MIB = 20.0


def usage(pid: int) -> dict[str, float]:
    """Memory of its own in MiB, and numbers of open files, threads and child processes."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {
        "memory_mib": int(status["RssAnon"].split()[0]) / 1024,
        "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(status["Threads"]),
        "children": len(children_of(pid)),
    }


def test_ten_thousand_iterations_need_no_more_than_a_thousand(tmp_path: Path) -> None:
    job = Training(
        tmp_path,
        "long",
        f"optim.epochs={N_ITERATIONS // 5}",
        "train.num_workers=1",
        "checkpointing.period=500",
        "evaluation.eval_period_iterations=1000",
    )
    job.start()
    pid = job.processes[0].pid or 0
    samples: list[dict[str, float]] = []
    workers = set()
    while job.is_alive():
        try:
            samples.append(usage(pid))
            workers |= set(children_of(pid))
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            break
        time.sleep(0.5)
    assert job.join() == [0], job.printed()[-3000:]
    early, late = samples[len(samples) // 10 : len(samples) // 5], samples[-len(samples) // 5 : -3]
    medians = [{name: statistics.median(s[name] for s in part) for name in samples[0]} for part in (early, late)]
    print(f"{N_ITERATIONS} iterations: {medians[0]} early, {medians[1]} late")
    assert medians[1]["memory_mib"] - medians[0]["memory_mib"] < MAX_GROWTH_MIB
    for name in ("files", "threads", "children"):
        assert medians[1][name] <= medians[0][name]
    time.sleep(1)
    assert not [worker for worker in workers if is_running(worker)], "workers were left behind"
