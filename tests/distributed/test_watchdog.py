"""A process that dies, fails, is suspended or falls behind is named by all others, which end in time."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinov3.distributed.stopping import PEER_LOST
from dinov3.distributed.watchdog import Watchdog
from tests.helpers.distributed import _launch_environment

if os.name != "posix":
    pytest.skip("needs POSIX signals", allow_module_level=True)

LOOP = """
import os, signal, sys, time
import torch, torch.distributed as dist
from datetime import timedelta
from dinov3 import distributed
from dinov3.distributed.watchdog import Watchdog

folder, what, culprit, timeout_s = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
distributed.enable(timeout=timedelta(seconds=60))
with Watchdog(folder, timeout_s) as watchdog:
    for iteration in range(6):
        watchdog.beat(f"loading the batch of iteration {iteration}")
        if iteration == 3 and distributed.get_rank() == culprit:
            time.sleep(1)  # its file says where it is
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "suspended":
                os.kill(os.getpid(), signal.SIGSTOP)
            if what == "slow":
                time.sleep(60)
            if what == "fails":
                raise ValueError("this picture is broken")
        watchdog.beat(f"computing iteration {iteration}")
        dist.all_reduce(torch.ones(3))
distributed.disable()
"""


def run(tmp_path: Path, what: str, culprit: int, world_size: int = 3, timeout_s: float = 2.0) -> list[tuple[int, str]]:
    """Exit codes and standard errors of processes of which the culprit goes wrong in its fourth iteration."""
    environment = os.environ | _launch_environment(world_size, "watchdog")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOOP, str(tmp_path / "beats"), what, str(culprit), str(timeout_s)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        deadline = time.monotonic() + 120
        waiting = [process for rank, process in enumerate(processes) if (rank, what) != (culprit, "suspended")]
        while None in [process.poll() for process in waiting]:
            assert time.monotonic() < deadline, "the others did not stop"
            time.sleep(0.05)
            processes[culprit].poll()  # or it stays known to the system
    finally:
        for process in processes:
            process.kill()
    return [(process.wait(), process.communicate()[1]) for process in processes]


@pytest.mark.parametrize(
    ("what", "culprit", "reason"),
    [
        ("killed", 1, "rank 1 was killed; last seen .* while loading the batch of iteration 3"),
        pytest.param("killed", 0, "rank 0 was killed", marks=pytest.mark.slow),
        ("suspended", 2, "rank 2 is silent: killed, suspended, or cut off; last seen .*iteration 3"),
        pytest.param(
            "slow",
            1,
            "rank 1 is behind the others, which wait for it; .* while loading the batch of iteration 3",
            marks=pytest.mark.slow,
        ),
        pytest.param("fails", 1, "rank 1 failed .ValueError: this picture is broken", marks=pytest.mark.slow),
    ],
)
def test_the_others_stop_and_name_the_rank(tmp_path: Path, what: str, culprit: int, reason: str) -> None:
    results = run(tmp_path, what, culprit)
    for rank, (code, stderr) in enumerate(results):
        if rank == culprit:
            assert code == {"slow": PEER_LOST, "fails": 1}.get(what, -signal.SIGKILL)
        else:
            assert code == PEER_LOST, stderr
            assert "gives up" in stderr
            assert re.search(reason, stderr), stderr


def test_nothing_is_left_after_a_regular_end(tmp_path: Path) -> None:
    results = run(tmp_path, "nothing", 0, world_size=2)
    assert [code for code, _ in results] == [0, 0], results
    assert not (tmp_path / "beats").exists()


def test_one_process_needs_no_watching(tmp_path: Path) -> None:
    with Watchdog(tmp_path / "beats", timeout_s=0.01) as watchdog:
        watchdog.beat("sleeping")
        time.sleep(0.1)
    assert not (tmp_path / "beats").exists()


def test_one_process_can_be_watched_too(tmp_path: Path) -> None:
    program = (
        "import sys, time; from dinov3.distributed.watchdog import Watchdog\n"
        "with Watchdog(sys.argv[1], 0.2, alone=True) as watchdog:\n"
        "    watchdog.beat('loading the batch of iteration 3')\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "beats")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert ended.returncode == PEER_LOST
    assert "no progress for 0.2 s while loading the batch of iteration 3" in ended.stderr
    assert not (tmp_path / "beats").exists()
