"""Seeds, source information, cluster settings, devices, environment variables."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov3 import env
from dinov3.utils import cluster, fix_random_seeds, get_conda_env, get_sha, info
from dinov3.utils.device import default_device


def test_seeds_fix_every_generator() -> None:
    draws = []
    for _ in range(2):
        fix_random_seeds(7)
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]
    fix_random_seeds(8)
    assert torch.rand(1).item() != draws[0][0]


def test_get_sha_in_and_outside_a_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(info, "__file__", str(package / "info.py"))
    assert get_sha() == "sha: N/A, status: N/A, branch: N/A"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run([*git, "init", "-q", "-b", "topic"], check=True)
    (package / "file").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "m"], check=True)
    assert get_sha().endswith("status: clean, branch: topic")
    (package / "file").write_text("2")
    assert "status: has uncommited changes" in get_sha()


def test_get_sha_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert get_sha() == "sha: N/A, status: N/A, branch: N/A"


def test_get_conda_env(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDA_DEFAULT_ENV", "name")
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    assert get_conda_env() == ("name", None)


@pytest.fixture
def neutral_site(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [key for key in os.environ if key.startswith("DINOV3_")]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("neutral_site")
def test_an_unnamed_site_passes_nothing_on() -> None:
    assert cluster.get_cluster_type() is None
    assert cluster.get_slurm_account() is None
    assert cluster.get_slurm_qos() is None
    assert cluster.get_user_checkpoint_path() == Path.home()
    assert cluster.get_slurm_executor_parameters(2, 4, timeout_min=5, mem_gb=1) == {
        "mem_gb": 1,
        "gpus_per_node": 4,
        "tasks_per_node": 4,
        "cpus_per_task": 10,
        "nodes": 2,
        "timeout_min": 5,
    }


@pytest.mark.usefixtures("neutral_site")
def test_environment_variables_beat_the_named_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV3_CLUSTER", "cw")
    monkeypatch.setenv("DINOV3_SLURM_PARTITION", "mine")
    monkeypatch.setenv("USER", "someone")
    assert cluster.get_cluster_type() is cluster.ClusterType.CW
    assert cluster.get_slurm_qos() == "explore"
    assert cluster.get_user_checkpoint_path() == Path("/someone")
    parameters = cluster.get_slurm_executor_parameters(1, 8)
    assert (parameters["slurm_partition"], parameters["cpus_per_task"]) == ("mine", 16)


def test_default_device_can_hold_tensors() -> None:
    device = default_device()
    assert torch.zeros(1, device=device).device == device
    assert (device.type == "cpu") == (not torch.accelerator.is_available())


def test_triton_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "before")
    env.set_triton_cache_dir(tmp_path)
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path)
    env.set_triton_cache_dir()
    assert Path(os.environ["TRITON_CACHE_DIR"]).is_dir()
    os.rmdir(os.environ["TRITON_CACHE_DIR"])


def test_clean_env_hides_compiler_caches_and_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("TRITON_CACHE_DIR", "cache")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with env.clean_env():
        assert "TRITON_CACHE_DIR" not in os.environ
        assert "SLURM_JOB_ID" not in os.environ
    assert os.environ["TRITON_CACHE_DIR"] == "cache"


def test_utils_and_env_import_with_torch_alone() -> None:
    code = (
        "import sys\n"
        "for name in ('numpy', 'torchvision', 'omegaconf', 'submitit', 'safetensors'): sys.modules[name] = None\n"
        "import dinov3.utils, dinov3.utils.utils, dinov3.utils.cluster, dinov3.utils.custom_callable, dinov3.env\n"
        "from dinov3.utils.device import default_device\n"
        "from dinov3.utils.dtype import as_torch_dtype\n"
        "as_torch_dtype('float32'); default_device()\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
