"""Writers: what other libraries read, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3.checkpointer.export import export_backbone, hf_config
from dinov3.checkpointer.weights import read_weights
from tests.helpers.backbones import VITS, assert_states_equal, tiny_convnext, tiny_vit


@pytest.mark.parametrize("make", [tiny_convnext, *(lambda kind=kind: tiny_vit(kind) for kind in VITS)])
@torch.no_grad()
def test_transformers_reads_an_exported_folder(tmp_path: Path, make: Any) -> None:
    import transformers

    model = make()
    folder = export_backbone(model, tmp_path / "new" / "folder", "hf")
    theirs, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    x = torch.randn(1, 3, 64, 64)
    # Our periods are rounded as in released files, theirs are not.
    torch.testing.assert_close(theirs.eval()(x).pooler_output, model(x), atol=2e-2, rtol=0)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("make", [tiny_vit, tiny_convnext])
def test_meta_layout_comes_back_as_it_was(tmp_path: Path, name: str, make: Any) -> None:
    model = make()
    path = export_backbone(model, tmp_path / name)
    assert_states_equal(read_weights(path), model.state_dict())
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_torch_file_holds_plain_tensors_of_its_own(tmp_path: Path) -> None:
    wide = torch.zeros(1000)
    export_backbone({"a": torch.nn.Parameter(wide[:2])}, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < 3000
    assert not torch.load(tmp_path / "a.pth", weights_only=True)["a"].requires_grad


def test_a_state_dict_can_be_exported_with_a_configuration(tmp_path: Path) -> None:
    model = tiny_vit()
    with pytest.raises(ValueError, match="config="):
        export_backbone(model.state_dict(), tmp_path / "hf", "hf")
    folder = export_backbone(model.state_dict(), tmp_path / "hf", "hf", config=hf_config(model))
    assert json.loads((folder / "config.json").read_text()) == hf_config(model)


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown format 'onnx'; expected one of meta, hf, timm"):
        export_backbone(tiny_vit(), tmp_path / "a", "onnx")
    model = tiny_vit()
    model.rope_embed.periods.mul_(2)
    with pytest.raises(ValueError, match=r"rope_embed\.periods"):
        export_backbone(model, tmp_path / "a", "hf")
    assert not any(tmp_path.iterdir())
