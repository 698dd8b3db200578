"""The launcher's command line, what it hands to scripts and to SLURM, and what a job does. Nothing is started here."""

import argparse
import logging
import pickle
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from dinov3.distributed.stopping import PREEMPTED, Stopped
from dinov3.run import local, slurm, submit
from dinov3.run.submit import CheckpointableSubmitter, get_run_parser, get_shared_folder, get_submitit_parser, main
from tests.helpers.source import ROOT

SCRIPT = """
import logging
from pathlib import Path

def main(argv):
    logging.getLogger("dinov3").info("the script is running")
    return argv

def fail(argv):
    raise ZeroDivisionError("on purpose")

def stop(argv):
    from dinov3.distributed.stopping import Stopped
    raise Stopped(__import__("signal").SIGUSR2)
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / f"script_{tmp_path.name}.py"
    path.write_text(SCRIPT)
    return str(path)


@pytest.fixture(autouse=True)
def _clean_logging() -> Any:
    from dinov3.logging import cleanup_logging

    level = logging.getLogger().level
    yield
    cleanup_logging()
    logging.getLogger().setLevel(level)


@pytest.fixture(autouse=True)
def _unnamed_site(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLUSTER", "SLURM_ACCOUNT", "SLURM_QOS", "SLURM_PARTITION", "CHECKPOINT_PATH"):
        monkeypatch.delenv(f"DINOV3_{name}", raising=False)


# -- The command line -------------------------------------------------------------------------------------------------


def test_defaults_are_the_published_ones() -> None:
    args = get_submitit_parser().parse_args([])
    assert (args.ngpus, args.nodes, args.timeout, args.slurm_nice, args.slurm_array_parallelism) == (8, 1, 2800, 0, 256)
    assert (args.comment, args.exclude) == ("", "")
    assert get_run_parser().parse_args(["script.py"]).callable_name == "main"


def test_arguments_of_the_script_keep_their_order_and_are_never_abbreviations() -> None:
    argv = ["train.py", "--node", "3", "--config-file", "c.yaml", "--nodes", "2", "a=1", "--output-dir=OUT", "b=2"]
    args, rest = get_run_parser().parse_known_args(argv)
    assert (args.module_path, args.nodes, args.output_dir) == ("train.py", 2, "OUT")
    assert rest == ["--node", "3", "--config-file", "c.yaml", "a=1", "b=2"]


def test_local_and_cluster_local_are_the_same() -> None:
    assert get_submitit_parser().parse_args(["--local"]).cluster == "local"
    assert get_submitit_parser().parse_args(["--cluster", "local"]).cluster == "local"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nodes", "2"], "--nodes 2 needs SLURM.*--nodes 1"),
        (["--ngpus", "999"], r"--ngpus 999: expected 1 to \d+, this machine has"),
        (["--ngpus", "0"], "--ngpus 0: expected 1 to"),
    ],
)
def test_more_than_this_machine_has_is_an_error_before_anything_starts(
    flags: list[str], message: str, script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([script, "--cluster", "local", "--output-dir", str(tmp_path / "out"), *flags])
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_script_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nowhere/train.py", "--local"])
    assert "there is no file nowhere/train.py" in capsys.readouterr().err


TRAIN, KNN = (str(ROOT / "dinov3" / path) for path in ("train/train.py", "eval/knn.py"))
RECIPES = "dinov3/configs/train"
DATA = "train.dataset_path=ImageFolder:root=images"
TEST_DATA = ["model.dino_hub=dinov3_vits16", "train.dataset=ImageFolder:root=x", "eval.test_dataset=ImageFolder:root=x"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([TRAIN, DATA, "train.batch_size=3"], r"train.batch_size \(did you mean train.batch_size_per_gpu"),
        ([TRAIN, "--seeed", "1", DATA], "--seeed"),
        ([TRAIN, DATA, "--seed", "1"], "options must come before the key=value overrides"),
        ([TRAIN, "--config-file", "nowhere.yaml", DATA], "there is no configuration file nowhere.yaml"),
        ([TRAIN, DATA, "gram.use_loss=true"], "gram.use_loss needs crops.gram_teacher_crops_size"),
        ([TRAIN, DATA, "student.arch=vit_smal"], "vit_smal"),
        ([TRAIN, "train.dataset_path=ImageFolder:rot=x"], "train.dataset_path: .*unknown key .rot."),
        ([TRAIN, "train.dataset_path=ImagNet:root=x"], "ImagNet"),
        ([TRAIN, "train.dataset_path=ImageNet:root=x:extra=x"], "train.dataset_path: dataset ImageNet needs split"),
        (
            [TRAIN, "--config-file", f"{RECIPES}/multi_distillation_test.yaml", "--multi-distillation", DATA],
            "the students need 8 processes, but 2 were started",
        ),
        ([TRAIN, "--config-file", f"{RECIPES}/vitl_im1k_lin834.yaml", "--multi-distillation", DATA], "multidistil"),
        ([KNN, *TEST_DATA, "train.kss=[1]"], "unknown key 'train.kss' .*did you mean 'train.ks'"),
        ([KNN, *TEST_DATA, "--batch-size", "3"], "expected key=value"),
        ([KNN, *TEST_DATA, "train.batch_size=many"], "many"),
        ([KNN, *TEST_DATA[:2]], "missing mandatory value: test_dataset"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[1:])[-40:],
)
@pytest.mark.parametrize("cluster", ["slurm", "local"])
def test_arguments_that_the_script_cannot_use_are_refused_before_anything_starts(
    cluster: str, argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--cluster", cluster, "--ngpus", "2", f"--output-dir={tmp_path}/out", *argv])
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_arguments_that_the_script_can_use_pass_without_an_accelerator(
    launched: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """Networks of any size, data that isn't there, and jobs that need other machines than this one."""
    from dinov3.train.train import check_arguments

    recipe = ["--config-file", f"{RECIPES}/dinov3_vit7b16_pretrain.yaml", "--output-dir", str(tmp_path / "out")]
    assert main([TRAIN, "--local", "--ngpus", "1", *recipe, DATA]) == 0
    assert main([KNN, "--local", "--ngpus", "1", f"output_dir={tmp_path}/out", *TEST_DATA]) == 0
    assert len(launched) == 2
    check_arguments(["--config-file", f"{RECIPES}/multi_distillation_test.yaml", "--multi-distillation", DATA], 8)
    assert not (tmp_path / "out").exists()


def test_every_evaluation_can_be_asked() -> None:
    scripts = [path for path in (ROOT / "dinov3" / "eval").rglob("*.py") if "return run_main(" in path.read_text()]
    assert len(scripts) > 3
    for script in scripts:
        assert submit._defines(str(script), "check_arguments"), script


def test_scripts_that_know_no_check_are_not_run_for_one(launched: list[tuple[Any, ...]], tmp_path: Path) -> None:
    script = tmp_path / "needs_a_gpu.py"
    script.write_text("from elsewhere import check_arguments\nraise RuntimeError('no GPU')\n")
    assert main([str(script), "--local", "--ngpus", "1", "--output-dir", str(tmp_path / "out"), "x"]) == 0
    assert launched[0][2] == ["x"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of the local launcher, which doesn't start anything."""
    calls: list[tuple[Any, ...]] = []

    def record(*args: Any) -> int:
        calls.append(args)
        return 0

    monkeypatch.setattr(local, "run_local", record)
    return calls


def test_processes_default_to_the_accelerators_or_one(
    launched: list[tuple[Any, ...]], script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    main([script, "--local", "--output-dir", str(tmp_path)])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    main([script, "--local", "--output-dir", str(tmp_path)])
    main([script, "--local", "--output-dir", str(tmp_path), "--ngpus", "2"])
    assert [call[-1] for call in launched] == [1, 3, 2]
    with pytest.raises(ValueError, match="--ngpus 4: expected 1 to 3, this machine has 3 visible accelerators"):
        local.check_n_processes(4)


def test_folder_logs_and_resume_command_are_printed(
    launched: list[tuple[Any, ...]], script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [script, "--cluster=local", "a=[1, 2]", "--output-dir", f"{tmp_path}/%j/x"]
    assert main(argv) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    folder = Path(printed["folder"])
    assert folder == launched[0][3]
    assert re.fullmatch(r"\d{8}-\d{6}-\d+", folder.parent.name)
    assert printed["logs"] == str(folder / "logs")
    words = shlex.split(printed["to resume"])
    assert words[:3] == [sys.executable, "-m", "dinov3.run.submit"]
    # The same command starts the same processes in the same folder.
    assert main(words[3:]) == 0
    assert launched[1] == launched[0] == (script, "main", ["a=[1, 2]"], folder, 1)


def test_evaluations_and_their_job_share_the_folder(
    launched: list[tuple[Any, ...]], script: str, tmp_path: Path
) -> None:
    main([script, "--local", f"output_dir={tmp_path}/results"])
    main([script, "--local", f"output_dir={tmp_path}/results", f"--output-dir={tmp_path}/other"])
    assert [call[3] for call in launched] == [tmp_path / "results", tmp_path / "other"]
    assert launched[0][2] == [f"output_dir={tmp_path}/results"]


def test_the_default_folder_is_one_per_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert get_shared_folder() == tmp_path / "experiments"
    monkeypatch.setenv("DINOV3_CHECKPOINT_PATH", "/shared")
    monkeypatch.setenv("USER", "ada")
    assert get_shared_folder() == Path("/shared/ada/experiments")


# -- What SLURM is told -----------------------------------------------------------------------------------------------


def parameters(*flags: str) -> dict[str, Any]:
    return slurm.executor_parameters(get_submitit_parser().parse_args(flags), "train:main")


def test_options_that_nobody_set_are_left_to_the_cluster() -> None:
    told = parameters()
    assert told["name"] == "train:main"
    assert (told["nodes"], told["tasks_per_node"], told["gpus_per_node"], told["timeout_min"]) == (1, 8, 8, 2800)
    assert told["slurm_signal_delay_s"] == 120
    assert not {"slurm_partition", "slurm_qos", "slurm_account", "slurm_comment", "slurm_exclude"} & told.keys()


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PARTITION", "QOS", "ACCOUNT"):
        monkeypatch.setenv(f"DINOV3_SLURM_{name}", f"my-{name.lower()}")
    told = parameters("--slurm-qos", "high", "--comment", "hello", "--exclude", "node3", "--slurm-nice", "7")
    assert (told["slurm_partition"], told["slurm_qos"], told["slurm_account"]) == ("my-partition", "high", "my-account")
    assert (told["slurm_comment"], told["slurm_exclude"]) == ("hello", "node3")
    assert told["slurm_additional_parameters"]["nice"] == 7


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands on PATH that accept every job as number 41 and keep its batch script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text("#!/bin/sh\n")
    (folder / "sbatch").write_text(f"#!/bin/sh\ncp $1 {tmp_path}/batch.sh\necho Submitted batch job 41\n")
    for command in folder.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return tmp_path / "batch.sh"


@pytest.mark.parametrize("flags", [[], ["--cluster", "slurm"]])
def test_a_job_in_the_queue(
    flags: list[str], fake_slurm: Path, script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [script, "--nodes", "2", "--ngpus", "4", "--slurm-partition", "p", *flags, "--output-dir", f"{tmp_path}/%j"]
    assert main([*argv, "--seed", "3", "a=1"]) == 0
    batch = fake_slurm.read_text()
    name = f"{Path(script).stem}:main"
    for line in (f"job-name={name}", "nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "partition=p", "time=2800"):
        assert f"#SBATCH --{line}\n" in batch
    assert "#SBATCH --signal=USR2@120\n" in batch
    assert "#SBATCH --requeue\n" in batch
    assert "--kill-on-bad-exit=1" in batch
    output = capsys.readouterr().out
    assert f"folder: {tmp_path}/41\n" in output
    assert re.search(rf"to resume: .*--output-dir={tmp_path}/41 .*--seed 3 a=1", output)
    delayed = pickle.loads((tmp_path / "41" / "41_submitted.pkl").read_bytes())
    assert delayed._timeout_countdown == slurm.MAX_NUM_TIMEOUT == 30
    assert delayed.function.args == ["--seed", "3", "a=1"]


# -- What a job does --------------------------------------------------------------------------------------------------


def test_the_output_folder_comes_first_unless_it_is_there(tmp_path: Path, script: str) -> None:
    out = tmp_path / "out"
    assert CheckpointableSubmitter(script, "main", ["a=1"], out)() == [f"--output-dir={out}", "a=1"]
    for given in (["--output-dir", "X", "a=1"], ["a=1", "--output-dir=X"]):
        assert CheckpointableSubmitter(script, "main", given, out)() == given
    text = (out / "logs" / "log.txt").read_text()
    assert text.count("the script is running") == 3  # one handler, however often it is set up


def test_a_requeued_job_keeps_its_folder_and_its_arguments(
    tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "here")
    job = CheckpointableSubmitter(script, "main", ["a=1"], f"{tmp_path}/%j")
    again = job.checkpoint().function
    assert isinstance(again, CheckpointableSubmitter)
    expected = [f"--output-dir={tmp_path}/12", "a=1"]
    assert job() == expected
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert again() == expected
    assert again.checkpoint().function() == expected


def test_errors_of_the_script_are_in_the_log(tmp_path: Path, script: str) -> None:
    with pytest.raises(ZeroDivisionError):
        CheckpointableSubmitter(script, "fail", [], tmp_path / "out")()
    assert "ZeroDivisionError: on purpose" in (tmp_path / "out" / "logs" / "log.txt").read_text()
    with pytest.raises(AttributeError, match="defines no 'nothing'"):
        CheckpointableSubmitter(script, "nothing", [], tmp_path / "out")()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR2"), reason="this platform has no SIGUSR2")
def test_a_preempted_job_is_queued_again_by_submitit_and_by_nobody_elsewhere(
    tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda signum, frame: queued.append(signum))
    monkeypatch.setattr("dinov3.run.job._END_WAIT_S", 0)
    try:
        job = CheckpointableSubmitter(script, "stop", [], tmp_path)
        for executor, expected in (("", []), ("slurm", [signal.SIGUSR2])):
            monkeypatch.setenv("SUBMITIT_EXECUTOR", executor)
            with pytest.raises(Stopped) as caught:
                job()
            assert caught.value.code == PREEMPTED
            assert queued == expected
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_the_cause_of_a_failure_is_told_from_its_consequences(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Process:
        pid = 7

    def report(*codes: int) -> int:
        outputs = [tmp_path / f"{rank}.txt" for rank in range(len(codes))]
        for output in outputs:
            output.write_text(f"last words of {output.stem}\n")
        return local._report(codes, [Process()] * len(codes), outputs)  # type: ignore[list-item]

    assert report(0, 0) == 0
    assert report(76, -9) == 137
    assert "rank 1 of 2 (process 7) was killed by SIGKILL" in caplog.text
    assert "last words of 1" in caplog.text
    assert report(76, 76, 1) == 1
    assert report(76, 75) == 75
    assert report(143, 143) == 143


def test_parsers_can_be_parents() -> None:
    parser = argparse.ArgumentParser(parents=[get_submitit_parser()])
    assert parser.parse_args(["--nodes", "3"]).nodes == 3
    assert submit.resume_command(["s.py", "--output-dir", "A", "x=1"], "B").endswith("--output-dir=B s.py x=1")
