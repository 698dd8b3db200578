import os
from pathlib import Path

import pytest

from dinov3.distributed import TorchDistributedEnvironment

SLURM = {
    "SLURM_JOB_ID": "42",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)


def fake_scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "scontrol"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_by_hand_there_is_one_process() -> None:
    environment = TorchDistributedEnvironment()
    assert (environment.rank, environment.world_size, environment.local_rank, environment.local_world_size) == (
        0,
        1,
        0,
        1,
    )
    assert environment.job_id is None
    assert environment.is_main_process
    assert str(environment) == f"manual job using 127.0.0.1:{environment.master_port} (rank=0, world size=1)"


def test_slurm_port_is_the_same_for_all_processes_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_scontrol(tmp_path, monkeypatch, "echo n1; echo n2")
    ports = set()
    for rank in ("0", "3"):
        for name, value in (SLURM | {"SLURM_PROCID": rank}).items():
            monkeypatch.setenv(name, value)
        ports.add(TorchDistributedEnvironment().master_port)
    assert len(ports) == 1


def test_slurm_node_list_must_fit_the_node_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_scontrol(tmp_path, monkeypatch, "echo n1")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="names 1 nodes .* SLURM_JOB_NUM_NODES is 2"):
        TorchDistributedEnvironment()


def test_scontrol_failures_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_scontrol(tmp_path, monkeypatch, "echo broken list >&2; exit 1")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="broken list"):
        TorchDistributedEnvironment()


def test_a_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(RuntimeError, match="MASTER_ADDR"):
        TorchDistributedEnvironment()


def test_export_refuses_to_change_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    environment = TorchDistributedEnvironment()
    with pytest.raises(RuntimeError, match="WORLD_SIZE is set to '8'"):
        environment.export(overwrite=False)
    assert "MASTER_PORT" not in os.environ
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
        monkeypatch.setenv(name, "to be restored")
    assert environment.export(overwrite=True, nccl_async_error_handling=True) is environment
    assert os.environ["WORLD_SIZE"] == "1"
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"
