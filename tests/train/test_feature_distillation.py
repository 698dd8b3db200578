"""Distillation of features from a backbone without heads, into a backbone of ours and into a ResNet."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from dinov3.checkpointer.export import export_backbone
from dinov3.checkpointer.weights import read_weights
from dinov3.configs import DinoV3SetupArgs, get_cfg_from_args
from dinov3.train.feature_distillation import FeatureDistillation, build_teacher, cosine_distance
from dinov3.train.train import build_meta_arch
from tests.helpers import tiny_training
from tests.helpers.tiny_training import main, with_output

RESNET = ["student.arch=torchvision:resnet18", "crops.global_crops_size=64", "crops.local_crops_size=32"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a distillation from the file of a backbone."""
    folder = tmp_path_factory.mktemp("tiny")
    teacher = tiny_training.vit_tiny_wide_test(4, layerscale_init=1.0)
    teacher.init_weights()
    (folder / "teacher.yaml").write_text("student: {arch: vit_tiny_wide_test, patch_size: 4, layerscale: 1.0}\n")
    return [
        *tiny_training.prepare(folder),
        "MODEL.META_ARCHITECTURE=FeatureDistillation",
        "distillation.enabled=true",
        f"distillation.full_cfg_path={folder / 'teacher.yaml'}",
        f"distillation.checkpoint_path={export_backbone(teacher, folder / 'teacher.pth')}",
        "student.layerscale=1.0",
        "optim.lr=0.1",  # that of a batch of 1024; the scaling rule makes it 0.025
    ]


def rows(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "training_metrics.json").read_text().splitlines()]


def test_a_backbone_of_ours_learns_the_features_and_resumes(arguments: list[str], tmp_path: Path) -> None:
    main(with_output(arguments, tmp_path, "optim.epochs=6"))
    found = rows(tmp_path)
    kinds = [f"{crops}_crops_{kind}_loss" for crops in ("global", "local") for kind in ("cls", "patch")]
    assert all(0 <= row[kind] <= 2 for row in found for kind in kinds)
    assert found[-1]["total_loss"] < 0.8 * found[0]["total_loss"]
    before = read_weights(tmp_path / "teacher_checkpoint.pth")
    (tmp_path / "teacher_checkpoint.pth").unlink()
    for path in (tmp_path / "ckpt").iterdir():
        if path.name == "29":
            path.rename(tmp_path / "the_last")
    main(with_output(arguments, tmp_path, "optim.epochs=6"))
    after = read_weights(tmp_path / "teacher_checkpoint.pth")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_resnet_learns_and_is_exported_with_the_names_of_its_library(arguments: list[str], tmp_path: Path) -> None:
    main(with_output(arguments, tmp_path, *RESNET, "optim.epochs=4", "teacher.momentum_teacher=0.5"))
    found = rows(tmp_path)
    assert found[-1]["total_loss"] < 0.8 * found[0]["total_loss"]
    exported = torch.load(tmp_path / "library_checkpoint.pth", weights_only=True)
    resnet = torchvision.models.resnet18()
    resnet.load_state_dict(exported, strict=True)
    assert exported["bn1.num_batches_tracked"] > 0
    assert not torch.equal(exported["bn1.running_mean"], torch.zeros(64))
    # and a further training starts from it
    start = f"student.pretrained_weights={tmp_path / 'library_checkpoint.pth'}"
    main(with_output(arguments, tmp_path / "on", *RESNET, start, "optim.epochs=1", "optim.freeze_backbone_epochs=1"))
    assert torch.equal(
        read_weights(tmp_path / "on" / "ckpt" / "4", network="student")["model.layer4.1.conv2.weight"],
        exported["layer4.1.conv2.weight"],
    )


def test_a_file_of_another_model_is_refused_with_counts(arguments: list[str], tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "resnet34.pth")
    start = f"student.pretrained_weights={tmp_path / 'resnet34.pth'}"
    with pytest.raises(ValueError, match=r"student.pretrained_weights=.*122 tensors match; 96 unexpected"):
        main(with_output(arguments, tmp_path, *RESNET, start))


def test_the_resolved_grid_of_the_teacher_is_the_students(arguments: list[str]) -> None:
    """Features of a teacher of stride 4 meet those of a student of stride 32: the loss is that of pooled features."""
    model = build(arguments, *RESNET)
    model.student["projector"] = Passing(torch.ones(2, 5), torch.ones(2, 4, 5))
    target = torch.randn(2, 16 * 16, 5)
    losses = model._losses(
        {"x_norm_clstoken": torch.zeros(2, 512), "x_norm_patchtokens": torch.zeros(2, 4, 512)},
        {"x_norm_clstoken": -torch.ones(2, 5), "x_norm_patchtokens": target},
        (64, 64),
    )
    assert losses["cls"].item() == pytest.approx(2)
    maps = nn.functional.interpolate(
        target.mT.reshape(2, 5, 16, 16), size=(2, 2), mode="bilinear", antialias=True, align_corners=False
    )
    expected = 1 - nn.functional.cosine_similarity(torch.ones(2, 5, 2, 2), maps, dim=1).mean()
    torch.testing.assert_close(losses["patch"], expected)


class Passing(nn.Module):
    def __init__(self, *outputs: torch.Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.outputs


def build(arguments: list[str], *overrides: str) -> FeatureDistillation:
    args = DinoV3SetupArgs(config_file=arguments[1], opts=[*arguments[2:], *overrides])
    model = build_meta_arch(get_cfg_from_args(args), multi_distillation=False)
    assert isinstance(model, FeatureDistillation)
    return model


def test_batch_norms_do_not_decay(arguments: list[str]) -> None:
    model = build(arguments, *RESNET, "optim.multi_tensor_optim=false")
    decays = {group["name"]: group["wd_multiplier"] for group in model.get_params_groups()}
    assert decays["model.bn1.weight"] == decays["model.layer1.0.bn2.bias"] == 0
    assert decays["model.conv1.weight"] == decays["cls.weight"] == 1


def test_teachers_of_the_hub_need_no_configuration() -> None:
    cfg = get_cfg_from_args(DinoV3SetupArgs(config_file="", opts=["distillation.checkpoint_path=dinov3_vits16"]))
    teacher = build_teacher(cfg.distillation)
    assert (teacher.embed_dim, teacher.n_storage_tokens) == (384, 4)
    assert next(teacher.parameters()).is_meta
    cfg.distillation.checkpoint_path = "weights.pth"
    with pytest.raises(ValueError, match=r"weights.pth is not known: give.*full_cfg_path.*dinov3_vits16"):
        build_teacher(cfg.distillation)


def test_the_distance_is_0_for_equal_and_2_for_opposite_directions() -> None:
    x = torch.randn(3, 4, 7)
    assert cosine_distance(x, 5 * x).item() == pytest.approx(0, abs=1e-6)
    assert cosine_distance(x, -x).item() == pytest.approx(2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distillation.enabled=false", "FeatureDistillation needs distillation.enabled: true"),
        ("distillation.cls_loss_weight=-1", "cls_loss_weight and patch_loss_weight must be >= 0"),
        ("student.resume_from_teacher_chkpt=x", "starts its student from student.pretrained_weights"),
        ("gram.use_loss=true", "FeatureDistillation has no Gram loss"),
    ],
)
def test_contradictions_are_named(arguments: list[str], tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(with_output(arguments, tmp_path, override))
