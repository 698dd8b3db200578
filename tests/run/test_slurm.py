"""Training and evaluation as SLURM jobs, on a real SLURM on this machine: `make test-slurm`.

Whatever happens to a job, it goes on where it stopped: at the end its losses and weights are those of a training that
nobody disturbed, bit for bit.
"""

import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dinov3.eval import knn, linear, log_regression
from dinov3.eval.knn import main as evaluate
from dinov3.run import slurm as launcher
from dinov3.run.submit import main as submit
from dinov3.train.train import main as train
from tests.helpers import tiny_training
from tests.helpers.distributed import run_distributed
from tests.helpers.imagenet import write_imagenet
from tests.helpers.images import write_image_folder
from tests.helpers.processes import find_process
from tests.helpers.slurm import LocalSlurm, missing_commands
from tests.helpers.source import ROOT
from tests.helpers.tiny_training import with_output
from tests.run.test_published_commands import EVAL_SIZES, EVALUATION, TRAINING, V1, words_of
from tests.run.test_running_doc import COMMANDS
from tests.train.test_end_to_end import assert_same_training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        bool(missing_commands()) or not sys.platform.startswith("linux"),
        reason=f"no SLURM here: {', '.join(missing_commands())} missing (Debian: slurmctld slurmd slurm-client munge)",
    ),
]

# The tiny training, at a pace that leaves time to disturb it.
SCRIPT = """
import time

from dinov3.train.loop import TrainingRun
from tests.helpers.tiny_training import main

step = TrainingRun.step


def slow_step(self, *args):
    time.sleep({seconds})
    return step(self, *args)


TrainingRun.step = slow_step
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    slurm = LocalSlurm(tmp_path_factory.mktemp("slurm"), n_nodes=2, gpus=2)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


@pytest.fixture(autouse=True)
def _client_environment(cluster: LocalSlurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield
    cluster.control("scancel", "--me")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_training.prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a training on two processes, without SLURM."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_distributed(_train, 2, folder, with_output(arguments, folder / "out"), init_group=False)
    return folder / "out"


def _train(argv: Sequence[str]) -> None:
    train(argv)


class Job:
    """A job that the launcher has put into the queue, and its folder."""

    def __init__(self, cluster: LocalSlurm, folder: Path, *argv: str, as_printed: bool = False) -> None:
        before = set(folder.glob("*_submission.sh"))
        first = [] if as_printed else [f"--output-dir={folder}", "--timeout", "30"]  # a later --timeout wins
        assert submit([*first, *argv]) == 0
        (script,) = set(folder.glob("*_submission.sh")) - before
        self.cluster, self.folder, self.number = cluster, folder, script.name.partition("_")[0]

    def wait_for_checkpoint(self) -> None:
        self.cluster.wait(lambda: list(self.folder.glob("ckpt/[0-9]*/.metadata")), 200)

    def finish(self) -> str:
        """Its final state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.cluster.wait(lambda: self.cluster.state(self.number) in ended, 400)
        return self.cluster.state(self.number)

    def restarts(self) -> int:
        return self.cluster.restarts(self.number)

    def text(self) -> str:
        """Everything that its tasks wrote."""
        files = [*self.folder.glob(f"{self.number}_*_log.*"), *self.folder.glob("logs/*")]
        return "\n".join(file.read_text() for file in files)

    def task_process(self, rank: int) -> int:
        """The process of a task."""
        return find_process("submitit", SLURM_JOB_ID=self.number, SLURM_PROCID=str(rank))


@pytest.fixture
def slow_script(tmp_path: Path) -> str:
    return _write_script(tmp_path, seconds=0.7)


def _write_script(folder: Path, seconds: float) -> str:
    path = folder / "slow_training.py"
    path.write_text(SCRIPT.format(seconds=seconds))
    return str(path)


def two_tasks(script: str, arguments: Sequence[str]) -> list[str]:
    return [script, "--ngpus", "2", *arguments]


def test_training_and_evaluation_with_two_tasks(
    cluster: LocalSlurm, arguments: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    job = Job(cluster, out, *two_tasks(str(ROOT / "tests/helpers/tiny_training.py"), arguments))
    assert job.finish() == "COMPLETED", job.text()
    assert_same_training(out, undisturbed)

    images = arguments[-1].partition("=")[2]
    evaluation = [
        f"model.config_file={out}/config.yaml",
        f"model.pretrained_weights={out}/teacher_checkpoint.pth",
        *("transform.resize_size=16", "transform.crop_size=16", "train.ks=[1,3]"),
        *("train.num_workers=0", "eval.num_workers=0"),
        *(f"train.dataset={images}", f"eval.test_dataset={images}"),
    ]
    script = str(ROOT / "tests/helpers/tiny_knn.py")
    job = Job(cluster, tmp_path / "knn", *two_tasks(script, [*evaluation, f"output_dir={tmp_path}/knn"]))
    assert job.finish() == "COMPLETED", job.text()
    evaluate([*evaluation, f"output_dir={tmp_path}/alone"])
    results = "results-knn.csv"
    assert (tmp_path / "knn" / results).read_text() == (tmp_path / "alone" / results).read_text()


def test_published_commands_train_on_two_nodes_and_evaluate_with_two_tasks(cluster: LocalSlurm, tmp_path: Path) -> None:
    out, data = tmp_path / "out", tmp_path / "imagenet"
    write_imagenet(data)
    places = {"OUT": str(out), "D1": str(data), "X1": str(data / "extra")}
    words = words_of(TRAINING["vitl_1k"], places, n_nodes=2)
    job = Job(cluster, out, "dinov3/train/train.py", "--ngpus", "1", *words, *V1)
    assert job.finish() == "COMPLETED", job.text()
    for kind, script in (("knn", knn), ("log_regression", log_regression), ("linear", linear)):
        words = words_of(EVALUATION[kind], places)
        job = Job(cluster, out, f"dinov3/eval/{kind}.py", "--ngpus", "2", *words, *EVAL_SIZES[kind])
        assert job.finish() == "COMPLETED", job.text()
        assert (out / script.RESULTS_FILENAME).is_file()


def test_commands_of_the_documentation_run_as_they_are_printed(
    cluster: LocalSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of docs/running.md for a cluster, in a folder with the package and images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dinov3").symlink_to(ROOT / "dinov3")
    write_image_folder(tmp_path / "images", classes=2, per_class=40, size=40, seed=0)
    training, evaluation = (
        words[3:] for words in COMMANDS if "dinov3.run.submit" in words[:3] and "local" not in words
    )
    job = Job(cluster, tmp_path / "runs/demo4", *training, as_printed=True)
    (tmp_path / "runs/demo").symlink_to("demo4")  # the evaluation takes what another command has trained
    assert job.finish() == "COMPLETED", job.text()
    job = Job(cluster, tmp_path / "runs/demo/knn", *evaluation, as_printed=True)
    assert job.finish() == "COMPLETED", job.text()
    assert (tmp_path / "runs/demo/knn" / knn.RESULTS_FILENAME).is_file()


def test_two_nodes_train_as_one(cluster: LocalSlurm, arguments: list[str], undisturbed: Path, tmp_path: Path) -> None:
    script = str(ROOT / "tests/helpers/tiny_training.py")
    job = Job(cluster, tmp_path / "out", script, "--nodes", "2", "--ngpus", "1", *arguments)
    assert job.finish() == "COMPLETED", job.text()
    assert "Slurm job" in job.text()
    assert_same_training(tmp_path / "out", undisturbed)


def test_a_preempted_job_goes_on(
    cluster: LocalSlurm, arguments: list[str], undisturbed: Path, tmp_path: Path, slow_script: str
) -> None:
    job = Job(cluster, tmp_path / "out", *two_tasks(slow_script, arguments))
    job.wait_for_checkpoint()
    cluster.submit("-p", "urgent", "-N", "2", "-c", "20", "--wrap", "sleep 5")
    assert job.finish() == "COMPLETED", job.text()
    assert job.restarts() == 1
    assert "stopped by SIGUSR2, exit code 75" in job.text()
    assert_same_training(tmp_path / "out", undisturbed)


def test_a_job_out_of_time_goes_on(
    cluster: LocalSlurm,
    arguments: list[str],
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # SLURM sends the signal up to a minute early; so late that the job has begun to train.
    monkeypatch.setattr(launcher, "SIGNAL_DELAY_S", 10)
    script = _write_script(tmp_path, seconds=3)
    job = Job(cluster, tmp_path / "out", *two_tasks(script, ["--timeout", "1", *arguments]))
    assert job.finish() == "COMPLETED", job.text()
    assert job.restarts() >= 1
    assert "this job is timed-out" in job.text()
    assert_same_training(tmp_path / "out", undisturbed)


def test_a_job_that_is_queued_again_from_outside_goes_on(
    cluster: LocalSlurm, arguments: list[str], undisturbed: Path, tmp_path: Path, slow_script: str
) -> None:
    job = Job(cluster, tmp_path / "out", *two_tasks(slow_script, ["--no-resume", *arguments]))
    job.wait_for_checkpoint()
    cluster.control("scontrol", "requeue", job.number)
    assert job.finish() == "COMPLETED", job.text()
    assert job.restarts() == 1
    assert_same_training(tmp_path / "out", undisturbed)


def test_a_cancelled_job_goes_on_with_the_same_command(
    cluster: LocalSlurm, arguments: list[str], undisturbed: Path, tmp_path: Path, slow_script: str
) -> None:
    argv = two_tasks(slow_script, arguments)
    job = Job(cluster, tmp_path / "out", *argv)
    job.wait_for_checkpoint()
    cluster.control("scancel", job.number)
    assert job.finish() == "CANCELLED", job.text()
    again = Job(cluster, tmp_path / "out", *argv)
    assert again.finish() == "COMPLETED", again.text()
    assert "Resuming from" in again.text()
    assert_same_training(tmp_path / "out", undisturbed)


def test_a_killed_task_ends_the_job_and_is_named(
    cluster: LocalSlurm, arguments: list[str], undisturbed: Path, tmp_path: Path, slow_script: str
) -> None:
    argv = two_tasks(slow_script, arguments)
    job = Job(cluster, tmp_path / "out", *argv)
    job.wait_for_checkpoint()
    os.kill(job.task_process(1), signal.SIGKILL)
    assert job.finish() == "FAILED"
    assert re.search(r"rank 1 was killed|task 1: Killed", job.text()), job.text()
    again = Job(cluster, tmp_path / "out", *argv)
    assert again.finish() == "COMPLETED", again.text()
    assert_same_training(tmp_path / "out", undisturbed)
