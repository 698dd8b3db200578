from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from dinov3.checkpointer import (
    init_fsdp_model_from_checkpoint,
    init_model_from_checkpoint_for_evals,
    save_checkpoint,
)
from tests.checkpointer.toy import Net, build, train
from tests.helpers.distributed import run_distributed

SKIPPED = ["dino_head", "center"]


def networks(sharded: bool = False, heads: bool = True) -> nn.ModuleDict:
    model = nn.ModuleDict({"backbone": Net()} | ({"dino_head": nn.Linear(6, 5)} if heads else {}))
    if sharded:
        for block in model["backbone"].blocks:
            fully_shard(block)
        for part in model.values():
            fully_shard(part)
    return model


def whole(model: nn.Module) -> dict[str, Any]:
    return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).tolist() for k, v in model.state_dict().items()}


def sources(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """The same weights in every form."""
    arch, optimizer = build(1)
    train(arch, optimizer, 2)
    ema = arch.model_ema
    torch.save({"teacher": ema.state_dict()}, folder / "teacher_checkpoint.pth")
    torch.save(ema["backbone"].state_dict(), folder / "released.pth")
    save_checkpoint(folder / "export", iteration="training_1", model=ema)
    save_checkpoint(folder / "training" / "1", iteration=1, model=arch, optimizer=optimizer)
    paths = {
        "file": folder / "teacher_checkpoint.pth",
        "backbone": folder / "released.pth",
        "export": folder / "export",
        "training": folder / "training" / "1",
    }
    return paths, whole(ema)


@pytest.mark.parametrize("form", ["file", "export", "training"])
def test_student_from_every_form(tmp_path: Path, form: str) -> None:
    paths, expected = sources(tmp_path)
    model = networks()
    init_fsdp_model_from_checkpoint(model, paths[form])
    assert whole(model) == expected


@pytest.mark.parametrize("form", ["file", "backbone", "export", "training"])
def test_gram_teacher_from_every_form(tmp_path: Path, form: str) -> None:
    paths, expected = sources(tmp_path)
    model = networks(heads=False)
    init_fsdp_model_from_checkpoint(model, paths[form], skip_load_keys=SKIPPED, keys_not_sharded=["periods"])
    assert whole(model) == {key: value for key, value in expected.items() if key.startswith("backbone.")}


def test_a_mismatch_is_an_error_that_names_keys(tmp_path: Path) -> None:
    paths, _ = sources(tmp_path)
    with pytest.raises(ValueError, match=r"missing: dino_head\.weight"):
        init_fsdp_model_from_checkpoint(networks(), paths["backbone"])
    with pytest.raises(ValueError, match=r"unexpected: dino_head\.weight"):
        init_fsdp_model_from_checkpoint(networks(heads=False), paths["file"])
    wider = nn.ModuleDict({"backbone": Net(), "dino_head": nn.Linear(6, 7)})
    with pytest.raises(RuntimeError, match=r"dino_head\.weight is \[5, 6\] in the checkpoint, \[7, 6\] here"):
        init_fsdp_model_from_checkpoint(wider, paths["export"])
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        init_fsdp_model_from_checkpoint(networks(), tmp_path / "nothing.pth")


def _load_sharded(paths: dict[str, Path]) -> dict[str, Any]:
    results = {}
    for form in ("file", "export", "training"):
        model = networks(sharded=True)
        init_fsdp_model_from_checkpoint(model, paths[form])
        results[form] = whole(model)
        assert type(model["backbone"].norm.weight.data).__name__ == "DTensor"
    return results


def test_sharded_models(tmp_path: Path) -> None:
    paths, expected = sources(tmp_path)
    for results in run_distributed(_load_sharded, 2, tmp_path, paths):
        assert all(state == expected for state in results.values())


@pytest.mark.parametrize("form", ["file", "backbone", "export", "training"])
@pytest.mark.parametrize("key", [None, "teacher"])
def test_backbone_for_evaluation(tmp_path: Path, form: str, key: str | None) -> None:
    paths, expected = sources(tmp_path)
    model = Net()
    report = init_model_from_checkpoint_for_evals(model, paths[form], key)
    assert {f"backbone.{k}": v for k, v in whole(model).items()}.items() <= expected.items()
    assert report.missing == report.unexpected == ()


def test_the_student_of_a_training_can_be_evaluated(tmp_path: Path) -> None:
    paths, _ = sources(tmp_path)
    ema, student = Net(), Net()
    init_model_from_checkpoint_for_evals(ema, paths["training"], "teacher")
    init_model_from_checkpoint_for_evals(student, paths["training"], "student")
    assert whole(ema) != whole(student)


def test_an_entry_of_a_file_is_named_by_the_key(tmp_path: Path) -> None:
    wanted, other = Net(), Net()
    wrapped = {f"module.backbone.{key}": value for key, value in wanted.state_dict().items()}
    torch.save({"teacher": other.state_dict(), "averaged": wrapped, "epoch": 3}, tmp_path / "file.pth")
    named, by_default = Net(), Net()
    init_model_from_checkpoint_for_evals(named, tmp_path / "file.pth", "averaged")
    init_model_from_checkpoint_for_evals(by_default, tmp_path / "file.pth", "not_there")
    assert whole(named) == whole(wanted)
    assert whole(by_default) == whole(other)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    paths, _ = sources(tmp_path)
    with pytest.raises(ValueError, match="do not fit Net"):
        init_model_from_checkpoint_for_evals(Net(width=8), paths["file"])
    deeper = Net()
    deeper.blocks.append(nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"missing: blocks\.2\.weight"):
        init_model_from_checkpoint_for_evals(deeper, paths["export"])
