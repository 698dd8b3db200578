"""Head files: what goes in comes out, nothing else is read."""

import dataclasses
from pathlib import Path

import pytest
import torch

from dinov3.checkpointer.heads import HeadFile, read_head, save_head

HEAD = HeadFile(
    task="segmentation",
    head={"conv.weight": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)},
    config={"decoder_type": "linear", "num_classes": 2, "layers": [0, 1], "nested": {"x": None}},
    backbone={"arch": "vit_nano", "patch_size": 8},
    class_names=["cat", "dog"],
    mean=(0.5, 0.4, 0.3),
    std=(0.1, 0.2, 0.3),
)


def test_a_head_file_comes_back_as_it_was(tmp_path: Path) -> None:
    path = save_head(tmp_path / "deep" / "head.pth", HEAD)
    for source in (path, path.parent):  # the file, or the folder of the run
        back = read_head(source)
        for field in dataclasses.fields(HeadFile):
            if field.name != "head":
                assert getattr(back, field.name) == getattr(HEAD, field.name)
        assert back.head.keys() == HEAD.head.keys()
        torch.testing.assert_close(back.head["conv.weight"], HEAD.head["conv.weight"], rtol=0, atol=0)
    assert [entry.name for entry in path.parent.iterdir()] == ["head.pth"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"head\.pth is not there"):
        read_head(tmp_path)
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not a head file: it holds model"):
        read_head(tmp_path / "other.pth")
    content = torch.load(save_head(tmp_path / "head.pth", HEAD), weights_only=True)
    del content["backbone"]
    torch.save(content, tmp_path / "head.pth")
    with pytest.raises(ValueError, match="lacks backbone"):
        read_head(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"layers": {"a": [torch.ones(1)]}}}, r"config\.layers\.a\[0\] .*must be plain values, got Tensor"),
        ({"head": {"w": 3}}, "other than tensors: w"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        save_head(tmp_path / "head.pth", dataclasses.replace(HEAD, **changes))
    assert not list(tmp_path.iterdir())
