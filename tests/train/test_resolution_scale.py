"""Distillation into a student of a larger stride: the teacher sees smaller crops, so that patches correspond."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import dinov3.train
from dinov3.configs import get_default_config
from dinov3.data import MaskingGenerator, collate_data_and_cast
from dinov3.models.convnext import convnext_sizes
from tests.helpers import tiny_training

GLOBAL, LOCAL, STRIDE, PATCH = 64, 32, 32, 16


def build(name: str, folder: Path, scale: float, *, distilled: bool) -> Any:
    """A meta architecture of a ConvNeXt student, with weights, in training mode."""
    heads = {key: value for key, value in OmegaConf.create(tiny_training.CONFIG).items() if key in ("dino", "ibot")}
    teacher = folder / "teacher.yaml"
    OmegaConf.save({"student": {"arch": "vit_tiny_test", "patch_size": PATCH}, **heads}, teacher)
    own = {
        "student": {"arch": "convnext_of_these_tests", "patch_size": PATCH, "drop_path_rate": 0.0},
        "crops": {"local_crops_number": 2, "teacher_to_student_resolution_scale": scale},
        "distillation": {"enabled": distilled, "full_cfg_path": str(teacher), "checkpoint_path": "ignore"},
    }
    cfg: Any = OmegaConf.merge(get_default_config(), heads, own)
    with torch.device("meta"):
        model = getattr(dinov3.train, name)(cfg)
    model.to_empty(device="cpu").init_weights()
    return model.train()


def make_batch(grid: int) -> dict[str, Any]:
    sizes = {"global_crops": GLOBAL, "local_crops": LOCAL}
    samples = [({key: [torch.randn(3, s, s) for _ in range(2)] for key, s in sizes.items()}, ()) for _ in range(3)]
    batch = collate_data_and_cast(samples, (0.4, 0.6), 1.0, torch.float32, mask_generator=MaskingGenerator(grid))
    return {**batch, "global_batch_size": 3}


def record_sizes(module: nn.Module) -> set[int]:
    """Filled with the widths of the images that a network's first layer sees."""
    seen: set[int] = set()
    module.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].shape[-1]))
    return seen


@pytest.fixture(autouse=True)
def tiny_convnext(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(convnext_sizes, "of_these_tests", {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 16]})


@pytest.mark.parametrize("name", ["SSLMetaArch", "MultiDistillationMetaArch"])
def test_only_the_teacher_sees_crops_shrunk_by_the_scale(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path, STRIDE / PATCH, distilled=True)
    teacher = record_sizes(model.teacher["backbone"].patch_embed)
    student = record_sizes(model.student["backbone"].downsample_layers[0])
    loss, _ = model.forward_backward(make_batch(GLOBAL // STRIDE), teacher_temp=0.07)
    assert loss.isfinite()
    assert teacher == {GLOBAL * PATCH // STRIDE}
    assert student == {GLOBAL, LOCAL}


def test_the_moving_average_of_the_student_sees_whole_crops(tmp_path: Path) -> None:
    model = build("SSLMetaArch", tmp_path, STRIDE / PATCH, distilled=False)
    teacher = record_sizes(model.teacher["backbone"].downsample_layers[0])
    loss, _ = model.forward_backward(make_batch(GLOBAL // STRIDE), teacher_temp=0.07)
    assert loss.isfinite()
    assert teacher == {GLOBAL}


def test_masks_of_another_grid_than_the_students_are_refused(tmp_path: Path) -> None:
    model = build("SSLMetaArch", tmp_path, 1.0, distilled=True)
    with pytest.raises(ValueError, match="masks are of 16 patches, but the student makes 4"):
        model.forward_backward(make_batch(GLOBAL // PATCH), teacher_temp=0.07)
