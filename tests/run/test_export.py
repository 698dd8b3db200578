"""The export command, on what a training leaves."""

from pathlib import Path

import pytest
import torch

from dinov3.checkpointer.weights import read_weights
from dinov3.run.export import build_around, main
from dinov3.train.train import main as train
from tests.helpers import tiny_training
from tests.helpers.tiny_training import N_ITERATIONS, with_output


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    train(with_output(tiny_training.prepare(folder), folder / "out", "student.mask_k_bias=true"))
    return folder / "out"


@pytest.mark.parametrize(
    ("format", "name"), [("meta", "b.pth"), ("meta", "b.safetensors"), ("timm", "t.pth"), ("hf", "folder")]
)
def test_every_layout_reads_back_as_the_teacher(training: Path, tmp_path: Path, format: str, name: str) -> None:
    written = main([str(training), str(tmp_path / name), "--format", format])
    assert written == tmp_path / name
    teacher = read_weights(training / "teacher_checkpoint.pth")
    again = read_weights(written)
    # timm has no place for the first, and computes the second anew
    compared = set(teacher) - ({"mask_token", "rope_embed.periods"} if format == "timm" else set())
    assert set(again) == set(teacher)
    for key in compared:
        assert torch.equal(teacher[key].float(), again[key].float()), key


def test_a_checkpoint_folder_and_the_student_can_be_exported(training: Path, tmp_path: Path) -> None:
    checkpoint = training / "ckpt" / str(N_ITERATIONS - 1)
    main([str(checkpoint), str(tmp_path / "teacher.pth")])
    main([str(training), str(tmp_path / "student.pth"), "--network", "student"])
    exported, student = read_weights(tmp_path / "teacher.pth"), read_weights(tmp_path / "student.pth")
    assert torch.equal(exported["cls_token"], read_weights(training / "teacher_checkpoint.pth")["cls_token"])
    assert not torch.equal(student["cls_token"], exported["cls_token"])


def test_without_a_destination_the_file_lies_in_the_training(training: Path) -> None:
    assert main([str(training)]) == training / "backbone.pth"


def test_a_folder_without_weights_is_an_error_that_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither teacher_checkpoint.pth nor a checkpoint in ckpt/"):
        main([str(tmp_path)])
    torch.save({"teacher": {"backbone.cls_token": torch.zeros(1, 1, 4)}}, tmp_path / "teacher_checkpoint.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint in ckpt/, and only those hold the student"):
        main([str(tmp_path), "--network", "student"])
    torch.save({"cls_token": torch.zeros(1, 1, 4)}, tmp_path / "alone.pth")
    with pytest.raises(FileNotFoundError, match="--config-file"):
        main([str(tmp_path / "alone.pth"), str(tmp_path / "hf"), "--format", "hf"])


@torch.no_grad()
def test_a_graph_gives_the_features_of_the_teacher(training: Path, tmp_path: Path) -> None:
    written = main([str(training), str(tmp_path / "backbone.pt2"), "--format", "pt2"])
    backbone, _ = build_around(read_weights(training / "teacher_checkpoint.pth"), str(training / "config.yaml"))
    images = torch.randn(3, 3, 64, 32)
    class_token, _ = torch.export.load(written).module()(images)
    torch.testing.assert_close(class_token, backbone.eval()(images), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="--half is for onnx and pt2"):
        main([str(training), str(tmp_path / "b.pth"), "--half"])
