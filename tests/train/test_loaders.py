"""Loaders of a training from its configuration."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from omegaconf import OmegaConf

from dinov3.configs import get_default_config
from dinov3.train.loaders import build_multi_resolution_data_loader_from_cfg
from dinov3.train.meta_arch import MetaArch
from tests.helpers import tiny_training


def test_resolutions_are_mixed_at_the_batch_that_a_multi_distillation_loads(tmp_path: Path) -> None:
    dataset = tiny_training.prepare(tmp_path)[-1]
    cfg: Any = OmegaConf.merge(
        get_default_config(),
        OmegaConf.create(tiny_training.CONFIG),
        OmegaConf.from_cli([dataset, "crops.global_crops_size=[16,24]", "crops.local_crops_size=[8,8]"]),
        OmegaConf.from_cli(["crops.gram_teacher_crops_size=[null,null]", "train.batch_size_per_gpu=2"]),
        OmegaConf.from_cli(["crops.global_local_crop_pairs_ratios=[0.5,0.5]", "multidistillation.enabled=true"]),
        OmegaConf.from_cli(["multidistillation.global_batch_size=3"]),
    )
    build_augmentation = partial(MetaArch.build_data_augmentation_dino, cast(Any, None))
    model: Any = SimpleNamespace(build_data_augmentation_dino=build_augmentation)
    batches = iter(build_multi_resolution_data_loader_from_cfg(cfg, model, 0))
    sizes = {tuple(next(batches)["collated_global_crops"].shape[::3]) for _ in range(8)}
    assert sizes == {(2 * 3, 16), (2 * 3, 24)}
