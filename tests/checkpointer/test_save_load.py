import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from dinov3 import distributed
from dinov3.checkpointer import RandomState, load_checkpoint, save_checkpoint
from dinov3.logging import MetricLogger
from tests.checkpointer.toy import Arch, build, full_state, load, save, train
from tests.helpers.distributed import run_distributed


def keys_of(folder: Path) -> dict[str, Any]:
    return dict(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)


def test_a_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    state, losses = save(tmp_path / "4", seed=1, n=5, sharded=False)
    iteration, loaded, resumed = load(tmp_path / "4", sharded=False)
    assert iteration == 4
    assert loaded == state
    assert resumed == losses


def test_layout_and_names(tmp_path: Path) -> None:
    save(tmp_path / "ckpt" / "0", seed=1, n=1, sharded=False)
    assert {p.name for p in (tmp_path / "ckpt").iterdir()} == {"0"}
    assert {p.name for p in (tmp_path / "ckpt" / "0").iterdir()} == {".metadata", "__0_0.distcp"}
    keys = keys_of(tmp_path / "ckpt" / "0")
    for key in (
        "iteration",
        "model.center",
        "model.student.backbone.blocks.0.weight",
        "model.student.backbone.periods",
        "model.teacher.dino_head.bias",
        "model.model_ema.dino_head.bias",
        "optimizer.state.student.backbone.norm.weight.exp_avg",
        "optimizer.state.student.dino_head.bias.step",
        "optimizer.param_groups.0.lr_multiplier",
        "optimizer.param_groups.1.params",
    ):
        assert key in keys


def test_shared_weights_are_stored_once_and_load_under_each_name(tmp_path: Path) -> None:
    arch, _ = build(3, width=200)
    save_checkpoint(tmp_path / "0", iteration=0, model=arch)
    one_network = 4 * sum(p.numel() for p in arch.student.parameters())
    assert (tmp_path / "0" / "__0_0.distcp").stat().st_size < 2.2 * one_network
    for name in ("teacher", "model_ema"):
        got = {"model": {f"{name}.dino_head.weight": torch.zeros(5, 200)}}
        with pytest.warns(UserWarning, match="single process"):
            dcp.load(got, checkpoint_id=tmp_path / "0")  # any reader finds both
        assert got["model"][f"{name}.dino_head.weight"].equal(arch.teacher["dino_head"].weight)


@pytest.mark.parametrize("absent", ["teacher", "model_ema"])
def test_one_name_of_shared_weights_is_enough_to_load(tmp_path: Path, absent: str) -> None:
    arch, _ = build(3)
    state = {"model": {k: v for k, v in arch.state_dict().items() if not k.startswith(absent)}, "iteration": 7}
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, checkpoint_id=tmp_path / "7")
    other, _ = build(4)
    assert load_checkpoint(tmp_path / "7", model=other) == 7
    assert full_state(other) == full_state(arch)
    assert other.teacher is other.model_ema


def _numpy_learning_rates(folder: Path) -> None:
    arch, optimizer = build(1)
    train(arch, optimizer, 1)
    optimizer.param_groups[0]["lr"] = np.float64(0.25)
    state = {"iteration": 0, "model": arch.state_dict()}
    state["optimizer"] = torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(arch, optimizer)
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, checkpoint_id=folder)


def test_checkpoints_with_numpy_numbers_load(tmp_path: Path) -> None:
    _numpy_learning_rates(tmp_path / "0")
    arch, optimizer = build(2)
    load_checkpoint(tmp_path / "0", model=arch, optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_our_checkpoints_hold_plain_numbers(tmp_path: Path) -> None:
    arch, optimizer = build(1)
    train(arch, optimizer, 1)
    optimizer.param_groups[0]["lr"] = np.float64(0.25)
    save_checkpoint(tmp_path / "0", iteration=0, model=arch, optimizer=optimizer)
    state: dict[str, Any] = {"optimizer": {"param_groups": [{"lr": None}]}}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(state, checkpoint_id=tmp_path / "0")
    assert type(state["optimizer"]["param_groups"][0]["lr"]) is float


def test_random_states_and_metrics_are_restored(tmp_path: Path) -> None:
    arch, _ = build(1)
    metrics = MetricLogger()
    metrics.update(loss=1.5)
    metrics.update(loss=2.5)
    save_checkpoint(tmp_path / "0", iteration=0, model=arch, random_state=RandomState(), metrics=metrics)

    def draws() -> list[Any]:
        import random

        return [torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(2).tolist()]

    expected = draws()
    restored = MetricLogger()
    load_checkpoint(tmp_path / "0", model=arch, random_state=RandomState(), metrics=restored)
    assert draws() == expected
    assert str(restored) == str(metrics)


def test_missing_keys_and_other_shapes_are_named(tmp_path: Path) -> None:
    arch, optimizer = build(1)
    save_checkpoint(tmp_path / "0", iteration=0, model=arch)
    with pytest.raises(RuntimeError, match=r"cannot load .*keys are missing: optimizer\.state\.student"):
        load_checkpoint(tmp_path / "0", model=arch, optimizer=optimizer)
    wide, _ = build(1, width=8)
    message = r"student\.backbone\.blocks\.0\.weight is \[6, 6\] in the checkpoint, \[8, 8\] here"
    with pytest.raises(RuntimeError, match=message):
        load_checkpoint(tmp_path / "0", model=wide, strict_loading=False)


def test_loading_that_is_not_strict_keeps_what_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arch, _ = build(1)
    save_checkpoint(tmp_path / "0", iteration=0, model=arch)
    larger, _ = build(2)
    larger.student["ibot_head"] = torch.nn.Linear(6, 3)
    before = larger.student["ibot_head"].weight.clone()
    optimizer = torch.optim.AdamW(larger.student.parameters())
    assert load_checkpoint(tmp_path / "0", model=larger, optimizer=optimizer, strict_loading=False) == 0
    assert larger.student["ibot_head"].weight.equal(before)
    assert larger.student["dino_head"].weight.equal(arch.student["dino_head"].weight)
    assert any("stay as they are" in message for message in caplog.messages)


def test_an_existing_checkpoint_is_replaced_only_if_wanted(tmp_path: Path) -> None:
    first, _ = build(1)
    second, _ = build(2)
    save_checkpoint(tmp_path / "0", iteration=0, model=first)
    with pytest.raises(RuntimeError, match="exists already"):
        save_checkpoint(tmp_path / "0", iteration=0, model=second, overwrite=False)
    save_checkpoint(tmp_path / "0", iteration=0, model=second)
    load_checkpoint(tmp_path / "0", model=first)
    assert full_state(first) == full_state(second)
    assert {p.name for p in tmp_path.iterdir()} == {"0"}


def test_a_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    arch, _ = build(1)
    with pytest.raises(FileNotFoundError, match="doesn't exist"):
        load_checkpoint(tmp_path / "nothing", model=arch)
    (tmp_path / "file").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected a folder with \.metadata"):
        load_checkpoint(tmp_path / "file", model=arch)
    (tmp_path / "file" / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(RuntimeError, match="damaged"):
        load_checkpoint(tmp_path / "file", model=arch)


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched-by-payload"),))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arch, _ = build(1)
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"iteration": _Payload(), "model": arch.state_dict()}, checkpoint_id=tmp_path / "0")
    with pytest.raises(RuntimeError, match="cannot load the checkpoint"):
        load_checkpoint(tmp_path / "0", model=arch)
    (tmp_path / "0" / ".metadata").write_bytes(pickle.dumps(_Payload()))
    with pytest.raises(RuntimeError, match="cannot load the checkpoint"):
        load_checkpoint(tmp_path / "0", model=arch)
    assert not (tmp_path / "touched-by-payload").exists()


@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (1, 2), (2, 3)])
def test_the_number_of_processes_may_change(tmp_path: Path, writers: int, readers: int) -> None:
    folder = tmp_path / "4"
    if writers == 1:
        state, losses = save(folder, 1, 5, False)
    else:
        state, losses = run_distributed(save, writers, tmp_path / "write", folder, 1, 5, True)[0]
    if readers == 1:
        results = [load(folder, False)]
    else:
        results = run_distributed(load, readers, tmp_path / "read", folder, True)
    for iteration, loaded, resumed in results:
        assert iteration == 4
        assert loaded == state
        torch.testing.assert_close(resumed, losses, rtol=1e-5, atol=0)


def _save_in_subgroups(folder: Path) -> list[str]:
    distributed.new_subgroups([[0], [1, 2]])
    group, first = distributed.get_process_subgroup(), distributed.get_rank() == 0
    target = folder / ("a" if first else "b") / "0"
    arch, _ = build(1)
    save_checkpoint(target, iteration=0, model=arch, process_group=group, random_state=RandomState())
    other = Arch(2)
    load_checkpoint(target, model=other, process_group=group, random_state=RandomState())
    assert full_state(other) == full_state(arch)
    return sorted(p.name for p in target.iterdir())


def test_subgroups_save_on_their_own(tmp_path: Path) -> None:
    results = run_distributed(_save_in_subgroups, 3, tmp_path / "run", tmp_path)
    assert results[0] == [".metadata", "__0_0.distcp"]
    assert results[1] == results[2] == [".metadata", "__0_0.distcp", "__1_0.distcp"]


def _fail_on_main(folder: Path) -> str:
    arch, _ = build(1)
    try:
        save_checkpoint(folder / "file" / "0", iteration=0, model=arch)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_folder_that_cannot_be_made_is_an_error_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for message in run_distributed(_fail_on_main, 2, tmp_path / "run", tmp_path):
        assert "cannot save the checkpoint" in message
        assert "file" in message


def test_moments_survive_another_grouping_of_the_parameters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arch, optimizer = build(1)
    train(arch, optimizer, 3)
    save_checkpoint(tmp_path / "2", iteration=2, model=arch, optimizer=optimizer)
    other, _ = build(2)
    regrouped = torch.optim.AdamW([{"params": [p], "lr_multiplier": 0.5} for p in other.student.parameters()], lr=0.1)
    assert load_checkpoint(tmp_path / "2", model=other, optimizer=regrouped, strict_loading=False) == 2
    assert "grouped otherwise" in caplog.text
    assert {group["lr_multiplier"] for group in regrouped.param_groups} == {0.5}
    assert train(other, regrouped, 3, first=3) == train(arch, optimizer, 3, first=3)
