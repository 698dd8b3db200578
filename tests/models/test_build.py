"""Backbones from a configuration."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dinov3.checkpointer import save_checkpoint
from dinov3.layers.fp8_linear import Fp8Linear
from dinov3.models import build_model, build_model_for_eval, build_model_from_cfg
from dinov3.models.vision_transformer import DinoVisionTransformer, register_vit

DEFAULTS = {
    "arch": "vit_tiny_of_these_tests",
    "patch_size": 4,
    "drop_path_rate": 0.3,
    "layerscale": 1e-5,
    "ffn_layer": "mlp",
    "ffn_ratio": 17.0,
    "qkv_bias": True,
    "proj_bias": True,
    "ffn_bias": True,
    "norm_layer": "layernorm",
    "n_storage_tokens": 2,
    "mask_k_bias": True,
    "untie_cls_and_patch_norms": False,
    "untie_global_and_local_cls_norm": False,
    "in_chans": 3,
    "pos_embed_rope_base": 100.0,
    "pos_embed_rope_min_period": None,
    "pos_embed_rope_max_period": None,
    "pos_embed_rope_normalize_coords": "separate",
    "pos_embed_rope_shift_coords": None,
    "pos_embed_rope_jitter_coords": None,
    "pos_embed_rope_rescale_coords": None,
    "pos_embed_rope_dtype": "bf16",
    "fp8_enabled": False,
    "fp8_filter": "blocks",
}


def student(**options: Any) -> SimpleNamespace:
    return SimpleNamespace(**(DEFAULTS | options))


def config(**options: Any) -> SimpleNamespace:
    return SimpleNamespace(student=student(**options), crops=SimpleNamespace(global_crops_size=[8, 16]))


@pytest.fixture(autouse=True)
def tiny_arch() -> None:
    def vit_tiny(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
        return DinoVisionTransformer(patch_size=patch_size, embed_dim=64, depth=2, num_heads=2, ffn_ratio=2, **kwargs)

    register_vit("vit_tiny_of_these_tests", vit_tiny)


def test_only_the_student_has_stochastic_depth() -> None:
    student_model, teacher, embed_dim = build_model(student())
    assert embed_dim == 64
    assert {block.sample_drop_ratio for block in student_model.blocks} == {0.3}
    assert {block.sample_drop_ratio for block in teacher.blocks} == {0.0}
    assert student_model is not teacher


def test_options_reach_the_model() -> None:
    model, _ = build_model(student(in_chans=5, pos_embed_rope_dtype="fp32", norm_layer="rmsnorm"), only_teacher=True)
    assert model.patch_embed.proj.in_channels == 5
    assert model.rope_embed.dtype == torch.float32
    assert model.blocks[0].mlp.fc1.out_features == 128  # the ratio of the architecture, not of the configuration
    assert "cls_norm.weight" not in model.state_dict()
    assert "norm.bias" not in model.state_dict()


def test_convnext_takes_its_options() -> None:
    student_model, teacher, embed_dim = build_model(student(arch="convnext_tiny", patch_size=16), device="meta")
    assert embed_dim == 768
    assert student_model.patch_size == 16
    assert student_model.stages[3][2].drop_path.drop_prob == pytest.approx(0.3)
    assert not hasattr(teacher.stages[3][2].drop_path, "drop_prob")


def test_from_cfg_builds_on_the_meta_device_for_the_largest_crop() -> None:
    student_model, teacher, _ = build_model_from_cfg(config())
    assert all(value.is_meta for model in (student_model, teacher) for value in model.state_dict().values())
    assert teacher.patch_embed.img_size == (16, 16)


def test_unknown_architectures() -> None:
    for arch in ("resnet50", "vit_unknown", "convnext_unknown"):
        with pytest.raises(NotImplementedError, match=arch):
            build_model(student(arch=arch))


def test_fp8_converts_what_the_filter_names() -> None:
    import torch._inductor.config as inductor_config

    before = inductor_config.triton.multi_kernel
    try:
        student_model, teacher, _ = build_model(student(fp8_enabled=True, fp8_filter="mlp", mask_k_bias=False))
    finally:
        inductor_config.triton.multi_kernel = before
    for model in (student_model, teacher):
        assert isinstance(model.blocks[0].mlp.fc1, Fp8Linear)
        assert not isinstance(model.blocks[0].attn.qkv, Fp8Linear)


def test_for_eval_without_weights_is_random_and_usable() -> None:
    model = build_model_for_eval(config(), "", device="cpu")
    assert not model.training
    assert model(torch.randn(1, 3, 8, 8)).isfinite().all()
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_for_eval_computes_in_float8_only_if_asked() -> None:
    import torch._inductor.config as inductor_config

    trained_in_fp8 = config(fp8_enabled=True)
    assert not any(isinstance(m, Fp8Linear) for m in build_model_for_eval(trained_in_fp8, None, device="cpu").modules())
    before = inductor_config.triton.multi_kernel
    try:
        asked = build_model_for_eval(trained_in_fp8, None, device="cpu", fp8=True)
    finally:
        inductor_config.triton.multi_kernel = before
    assert isinstance(asked.blocks[0].mlp.fc1, Fp8Linear)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # by torch 2.7 itself
@pytest.mark.parametrize("form", ["bare", "teacher", "dcp"])
def test_for_eval_loads_what_training_writes(form: str, tmp_path: Path) -> None:
    source = build_model_for_eval(config(), None, device="cpu")
    state, path = source.state_dict(), tmp_path / "weights.pth"
    if form == "bare":
        torch.save(state, path)
    elif form == "teacher":
        heads = {"dino_head.last_layer.weight": torch.zeros(3, 3)}
        torch.save({"teacher": {f"backbone.{key}": value for key, value in state.items()} | heads}, path)
    else:
        path = tmp_path / "sharded"
        save_checkpoint(path, iteration="training_3", model=nn.ModuleDict({"backbone": source}))
    model = build_model_for_eval(config(), path, device="cpu")
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_for_eval_refuses_weights_of_another_model(tmp_path: Path) -> None:
    state = build_model_for_eval(config(), None, device="cpu").state_dict()
    torch.save(state | {"norm.weight": torch.zeros(3)}, tmp_path / "misshapen.pth")
    del state["blocks.1.norm1.weight"]
    torch.save(state, tmp_path / "incomplete.pth")
    with pytest.raises(ValueError, match=r"norm\.weight \[3\]"):
        build_model_for_eval(config(), tmp_path / "misshapen.pth", device="cpu")
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.norm1\.weight"):
        build_model_for_eval(config(), tmp_path / "incomplete.pth", device="cpu")


def test_sharding_without_processes_changes_nothing() -> None:
    model = build_model_for_eval(config(), None, shard_unsharded_model=True, device="cpu")
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 64)
