"""The local launcher, whole: the same training as without it, and what happens when processes are stopped or die."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from dinov3.distributed.stopping import PEER_LOST, PREEMPTED
from dinov3.train.train import main as train
from tests.helpers import tiny_training
from tests.helpers.distributed import run_distributed
from tests.helpers.processes import find_process
from tests.helpers.source import ROOT
from tests.helpers.tiny_training import with_output
from tests.train.test_end_to_end import assert_same_training

if not sys.platform.startswith("linux"):
    pytest.skip("finds processes in /proc", allow_module_level=True)

SCRIPT = str(ROOT / "tests" / "helpers" / "tiny_training.py")
STANDALONE = ["--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_training.prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a training on two processes that nobody disturbed, started without any launcher."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_distributed(_train, 2, folder, with_output(arguments, folder / "out"), init_group=False)
    return folder / "out"


def _train(argv: Sequence[str]) -> None:
    train(argv)


def start(argv: Sequence[str], *flags: str) -> subprocess.Popen[str]:
    """The launcher, running in its own process."""
    return run_module("dinov3.run.submit", SCRIPT, "--cluster", "local", *flags, *argv)


def torchrun(argv: Sequence[str], *flags: str) -> subprocess.Popen[str]:
    """The training under torchrun, running in its own process."""
    return run_module("torch.distributed.run", *flags, "-m", "tests.helpers.tiny_training", *argv)


def run_module(name: str, *arguments: str) -> subprocess.Popen[str]:
    """`python -m name arguments`; what it prints, errors too, can be read."""
    return subprocess.Popen(
        [sys.executable, "-m", name, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_checkpoint(output_dir: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not list(output_dir.glob("ckpt/[0-9]*/.metadata")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.01)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output = process.communicate(timeout=200)[0]
    return process.returncode, output


def test_a_preempted_training_saves_leaves_and_goes_on_bit_for_bit(
    arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    argv = with_output(arguments, tmp_path / "out")
    process = start(argv, "--ngpus", "2")
    wait_for_checkpoint(tmp_path / "out", process)
    process.send_signal(signal.SIGUSR2)
    code, output = finish(process)
    assert code == PREEMPTED, output
    assert not (tmp_path / "out" / "teacher_checkpoint.pth").exists() or "stopped by SIGUSR2" in output
    resume = next(line for line in output.splitlines() if line.startswith("to resume: "))
    code, output = finish(
        subprocess.Popen(
            resume.removeprefix("to resume: "),
            shell=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    )
    assert code == 0, output
    assert "Resuming from" in output
    assert_same_training(tmp_path / "out", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "exit_code", "message"),
    [
        (signal.SIGKILL, 128 + signal.SIGKILL, "rank 1 of 2 (process {pid}) was killed by SIGKILL"),
        (signal.SIGSTOP, PEER_LOST, "Reason: rank 1 is silent: killed, suspended, or cut off"),
    ],
)
def test_a_killed_or_stalled_rank_is_named_and_the_next_run_is_right(
    signum: int, exit_code: int, message: str, arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    argv = with_output(arguments, tmp_path / "out")
    process = start(["--stall-timeout", "10", *argv], "--ngpus", "2")
    wait_for_checkpoint(tmp_path / "out", process)
    pid = find_process(str(tmp_path / "out"), RANK="1")
    os.kill(pid, signum)
    code, output = finish(process)
    assert code == exit_code, output
    assert message.format(pid=pid) in output
    code, output = finish(start(argv, "--ngpus", "2"))
    assert code == 0, output
    assert_same_training(tmp_path / "out", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("n_processes", [1, 2])
def test_torchrun_and_the_launcher_train_alike(
    n_processes: int, arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """And like a training that no launcher started."""
    wanted = undisturbed if n_processes == 2 else tmp_path / "plain"
    if n_processes == 1:
        train(with_output(arguments, wanted))
    for name, begin, flags in (("launcher", start, ["--ngpus"]), ("torchrun", torchrun, STANDALONE)):
        code, output = finish(begin(with_output(arguments, tmp_path / name), *flags, f"{n_processes}"))
        assert code == 0, output
        assert_same_training(tmp_path / name, wanted)


@pytest.mark.slow
def test_two_nodes_of_torchrun_train_as_one(arguments: list[str], undisturbed: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    flags = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    nodes = [torchrun(with_output(arguments, tmp_path / "out"), *flags) for _ in range(2)]
    for node in nodes:
        code, output = finish(node)
        assert code == 0, output
    assert_same_training(tmp_path / "out", undisturbed)
