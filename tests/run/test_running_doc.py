"""docs/running.md: its commands parse, and its tables say what the code does."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dinov3.configs import get_cfg_from_args
from dinov3.distributed.stopping import PEER_LOST, PREEMPTED
from dinov3.eval.helpers import args_dict_to_dataclass, cli_parser
from dinov3.eval.knn import KnnEvalConfig
from dinov3.run.submit import get_run_parser
from dinov3.train.train import parse_args
from tests.helpers.images import write_image_folder
from tests.helpers.source import ROOT

TEXT = (ROOT / "docs" / "running.md").read_text()
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


def script_and_arguments(words: list[str]) -> tuple[str, list[str]]:
    """The script that a command runs, and what it is given."""
    if "dinov3.run.submit" in words:
        args, rest = get_run_parser().parse_known_args(words[words.index("dinov3.run.submit") + 1 :])
        output_dir = [] if args.output_dir is None else [f"--output-dir={args.output_dir}"]
        return args.module_path, [*output_dir, *rest]
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[at], words[at + 1 :]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_parse_and_know_every_key(words: list[str], tmp_path: Path) -> None:
    script, arguments = script_and_arguments(words)
    assert (ROOT / script).is_file()
    if script.endswith("knn.py"):
        parsed = cli_parser(arguments) | {"output_dir": str(tmp_path)}
        args_dict_to_dataclass(parsed, KnnEvalConfig, save_config=False)
        return
    assert script.endswith("train.py")
    args = parse_args(arguments)
    if args.config_file != "CONFIG":
        get_cfg_from_args(args, strict=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_for_one_machine_run_as_they_are_printed(tmp_path: Path) -> None:
    """One after the other, in a folder with the package and images; `--dry-run` writes nothing."""
    (tmp_path / "dinov3").symlink_to(ROOT / "dinov3")
    write_image_folder(tmp_path / "images", classes=2, per_class=40, size=40, seed=0)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    ran = []
    for words in COMMANDS:
        if words[0] == "docker" or (any("submit" in word for word in words) and "local" not in words):
            continue
        result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
        assert (tmp_path / "runs").exists() == ("--dry-run" not in words)
        ran.append(words[0] if words[1] != "-m" else words[2])
    assert ran == ["python", "python", "dinov3.run.submit", "torchrun"]
    losses = [
        [json.loads(line)["total_loss"] for line in (tmp_path / run / "training_metrics.json").read_text().splitlines()]
        for run in ("runs/demo2", "runs/demo3")
    ]
    assert losses[0] == losses[1], "the launcher and torchrun train alike"


def test_exit_codes_are_those_of_the_code() -> None:
    rows = dict(re.findall(r"^\| ([\d, ]+) \| ([^|]+) \|", TEXT, re.MULTILINE))
    assert "checkpoint saved" in rows[str(PREEMPTED)]
    assert "died or stalled" in rows[str(PEER_LOST)]
    assert f"{128 + signal.SIGINT}, {128 + signal.SIGTERM}" in rows


def test_every_slurm_setting_exists() -> None:
    flags = set(re.findall(r"`(--slurm-\w+|--timeout|--exclude|--comment|--nodes|--ngpus|--cluster)", TEXT))
    known = {flag for flag in flags if flag in get_run_parser().format_help()}
    assert flags == known
    readers = "".join((ROOT / "dinov3" / file).read_text() for file in ("utils/cluster.py", "eval/probe.py"))
    assert all(name in readers for name in re.findall(r"`\$?(DINOV3_\w+)", TEXT))
