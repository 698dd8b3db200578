"""Distillation into a student of a larger stride: the teacher sees smaller crops, so that patches correspond."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import dinov3.train
from dinov3.configs import get_default_config
from dinov3.data import MaskingGenerator, collate_data_and_cast
from dinov3.models.convnext import convnext_sizes
from tests.helpers import tiny_training

GLOBAL, LOCAL, STRIDE, PATCH = 64, 32, 32, 16


@pytest.mark.parametrize("name", ["SSLMetaArch", "MultiDistillationMetaArch"])
def test_only_the_teacher_sees_crops_shrunk_by_the_scale(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(convnext_sizes, "of_this_test", {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 16]})
    heads = {key: value for key, value in OmegaConf.create(tiny_training.CONFIG).items() if key in ("dino", "ibot")}
    OmegaConf.save({"student": {"arch": "vit_tiny_test", "patch_size": PATCH}, **heads}, tmp_path / "teacher.yaml")
    own = {
        "student": {"arch": "convnext_of_this_test", "patch_size": PATCH, "drop_path_rate": 0.0},
        "crops": {"local_crops_number": 2, "teacher_to_student_resolution_scale": STRIDE / PATCH},
        "distillation": {
            "enabled": True,
            "full_cfg_path": str(tmp_path / "teacher.yaml"),
            "checkpoint_path": "ignore",
        },
    }
    cfg: Any = OmegaConf.merge(get_default_config(), heads, own)
    with torch.device("meta"):
        model = getattr(dinov3.train, name)(cfg)
    model.to_empty(device="cpu").init_weights()
    model.train()
    seen: dict[str, set[int]] = {"teacher": set(), "student": set()}
    model.teacher["backbone"].patch_embed.register_forward_pre_hook(lambda _, x: seen["teacher"].add(x[0].shape[-1]))
    stem = model.student["backbone"].downsample_layers[0]
    stem.register_forward_pre_hook(lambda _, x: seen["student"].add(x[0].shape[-1]))

    sizes = {"global_crops": GLOBAL, "local_crops": LOCAL}
    samples = [({key: [torch.randn(3, s, s) for _ in range(2)] for key, s in sizes.items()}, ()) for _ in range(3)]
    grid = GLOBAL // STRIDE
    batch = collate_data_and_cast(samples, (0.4, 0.6), 1.0, torch.float32, mask_generator=MaskingGenerator(grid))
    loss, _ = model.forward_backward({**batch, "global_batch_size": 3}, teacher_temp=0.07)
    assert loss.isfinite()
    assert seen == {"teacher": {GLOBAL * PATCH // STRIDE}, "student": {GLOBAL, LOCAL}}
