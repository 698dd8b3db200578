"""`load_head`: the backbone that a head file names, with its weights, under the head."""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from dinov3.checkpointer.heads import HeadFile, save_head
from dinov3.configs.schema import Student
from dinov3.hub import heads, load_head
from dinov3.hub.registry import BACKBONES, BackboneEntry, Weights
from dinov3.models.build import build_backbone, describe_backbone
from dinov3.models.vision_transformer import DinoVisionTransformer

OPTIONS: dict[str, Any] = {"embed_dim": 16, "depth": 1, "num_heads": 1, "ffn_ratio": 1}


@pytest.fixture
def toy_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task whose model is a linear layer after the backbone."""
    import sys

    module = ModuleType("toy_task_models")

    def build_from_head(backbone: nn.Module, head_file: HeadFile) -> nn.Module:
        model = nn.Sequential(backbone, nn.Linear(int(head_file.config["width"]), 2))
        model[1].load_state_dict(head_file.head, strict=True)
        return model

    module.build_from_head = build_from_head  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(heads._TASKS, "toy", module.__name__)
    monkeypatch.setitem(
        BACKBONES,  # type: ignore[arg-type]
        "dinov3_vittoy",
        BackboneEntry("dinov3_vittoy", {Weights.LVD1689M: "00000000"}, DinoVisionTransformer, OPTIONS),
    )


def head_file(width: int, backbone: str | dict[str, Any]) -> HeadFile:
    state = nn.Linear(width, 2).state_dict()
    return HeadFile("toy", dict(state), {"width": width}, backbone, class_names=["a", "b"])


@pytest.mark.usefixtures("toy_task")
def test_a_backbone_of_the_hub_comes_with_the_weights_given(tmp_path: Path) -> None:
    backbone = DinoVisionTransformer(**OPTIONS)
    backbone.init_weights()
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    path = save_head(tmp_path / "head.pth", head_file(16, "dinov3_vittoy"))
    model = load_head(path, backbone_weights=tmp_path / "weights.pth")
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model[0](images), backbone.eval()(images), rtol=0, atol=0)
    assert not model.training
    assert model.head_file == dataclasses.replace(head_file(16, "dinov3_vittoy"), head={})


@pytest.mark.usefixtures("toy_task")
def test_a_backbone_of_ones_own_training_is_described_in_the_file(tmp_path: Path) -> None:
    spec = describe_backbone(Student(arch="vit_nano", patch_size=8, n_storage_tokens=2))
    from types import SimpleNamespace

    backbone = build_backbone(SimpleNamespace(**spec))
    backbone.init_weights()  # type: ignore[operator]
    state = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    torch.save({"teacher": state}, tmp_path / "teacher_checkpoint.pth")
    width = int(backbone.embed_dim)  # type: ignore[arg-type]
    path = save_head(tmp_path / "head.pth", head_file(width, spec))
    model = load_head(path, backbone_weights=tmp_path / "teacher_checkpoint.pth")
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model[0](images), backbone.eval()(images), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"of your own \(vit_nano\): pass its weights"):
        load_head(path)


@pytest.mark.usefixtures("toy_task")
def test_a_backbone_can_be_passed(tmp_path: Path) -> None:
    backbone = nn.Linear(4, 4)
    path = save_head(tmp_path / "head.pth", head_file(4, "dinov2_vits14"))
    assert load_head(path, backbone=backbone)[0] is backbone
    with pytest.raises(ValueError, match=r"'dinov2_vits14', which this hub does not have: pass backbone="):
        load_head(path)
    with pytest.raises(ValueError, match="got both"):
        load_head(path, backbone=backbone, backbone_weights="x.pth")


@pytest.mark.usefixtures("toy_task")
def test_other_tasks_and_other_widths_are_named(tmp_path: Path) -> None:
    path = save_head(tmp_path / "head.pth", dataclasses.replace(head_file(4, "x"), task="poetry"))
    with pytest.raises(ValueError, match=r"a head for 'poetry'; known tasks: segmentation, depth"):
        load_head(path, backbone=nn.Linear(4, 4))
    path = save_head(tmp_path / "head.pth", dataclasses.replace(head_file(4, "x"), config={"width": 5}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_head(path, backbone=nn.Linear(4, 4))
