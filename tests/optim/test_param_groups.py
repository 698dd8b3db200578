import pytest
import torch
from torch import nn

from dinov3.optim import (
    fuse_params_groups,
    get_params_groups_with_decay,
    get_vit_lr_decay_rate,
    remove_fsdp_compile_names,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(2)
        self.proj = nn.Linear(2, 2)
        self.gamma = nn.Parameter(torch.ones(2))


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 2))
        self.patch_embed = nn.Linear(3, 2)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(2)
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, 2))
        self.last_layer = nn.Linear(2, 4, bias=False)


def by_name(groups: list[dict]) -> dict[str, tuple[float, float, bool]]:
    return {g["name"]: (g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"]) for g in groups}


@pytest.mark.parametrize(
    ("name", "layers_to_the_end"),
    [
        ("cls_token", 4),
        ("mask_token", 4),
        ("storage_tokens", 4),
        ("pos_embed", 4),
        ("patch_embed.proj.weight", 4),
        ("blocks.0.attn.qkv.weight", 3),
        ("blocks.2.norm1.bias", 1),
        ("blocks.1.residual.weight", 0),
        ("norm.weight", 0),
        ("local_cls_norm.weight", 0),
    ],
)
def test_layer_wise_decay(name: str, layers_to_the_end: int) -> None:
    expected = 0.5**layers_to_the_end
    assert get_vit_lr_decay_rate(name, 0.5, num_layers=3, force_is_backbone=True) == expected
    assert get_vit_lr_decay_rate(f"backbone.{name}", 0.5, num_layers=3) == expected
    assert get_vit_lr_decay_rate(name, 0.5, num_layers=3) == 1.0  # not known to be a backbone's


def test_layer_wise_decay_of_blocks_in_chunks() -> None:
    rate = get_vit_lr_decay_rate("blocks.1.7.mlp.fc1.weight", 0.5, 12, force_is_backbone=True, chunked_blocks=True)
    assert rate == 0.5 ** (13 - 8)


def test_groups_of_a_backbone() -> None:
    groups = by_name(get_params_groups_with_decay(Backbone(), lr_decay_rate=0.5, patch_embed_lr_mult=0.25))
    assert groups["cls_token"] == (0.125, 1.0, False)
    assert groups["patch_embed.weight"] == (0.125 * 0.25, 1.0, False)
    assert groups["patch_embed.bias"] == (0.125 * 0.25, 0.0, False)
    assert groups["blocks.0.proj.weight"] == (0.25, 1.0, False)
    assert groups["blocks.1.norm1.weight"] == (0.5, 0.0, False)
    assert groups["blocks.1.gamma"] == (0.5, 0.0, False)
    assert groups["norm.weight"] == (1.0, 0.0, False)
    assert "frozen" not in groups


def test_groups_of_a_head() -> None:
    groups = by_name(get_params_groups_with_decay(Head(), lr_decay_rate=0.5, dino_head_wd_multiplier=0.5))
    assert groups["mlp.0.weight"] == (1.0, 1.0, False)  # whose head it is, nobody said
    assert groups["last_layer.weight"] == (1.0, 1.0, True)


def test_weight_decay_of_the_dino_head_needs_its_name() -> None:
    options = {"dino_head_wd_multiplier": 0.5}
    dino = by_name(get_params_groups_with_decay(Head(), **options, module_name="dino_head"))
    assert dino["mlp.0.weight"] == (1.0, 0.5, False)
    assert dino["mlp.0.bias"] == (1.0, 0.0, False)
    ibot = by_name(get_params_groups_with_decay(Head(), **options, module_name="ibot_head"))
    assert ibot["mlp.0.weight"] == (1.0, 1.0, False)


def test_fused_groups_hold_every_parameter_once_in_order_of_appearance() -> None:
    model = Backbone()
    groups = get_params_groups_with_decay(model, lr_decay_rate=0.5, patch_embed_lr_mult=0.25)
    fused = fuse_params_groups(groups)
    params = [id(p) for group in fused for p in group["params"]]
    assert sorted(params) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    keys = [(g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"]) for g in fused]
    assert keys == list(dict.fromkeys(by_name(groups).values()))
    assert all("name" not in group for group in fused)
    torch.optim.AdamW(fused)  # and an optimizer takes them
    torch.optim.AdamW(groups)


def test_fusing_takes_groups_of_single_parameters_and_other_keys() -> None:
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = [{"params": a, "kind": 1}, {"params": [b], "kind": 2}, {"params": c, "kind": 1}]
    assert fuse_params_groups(groups, keys=("kind",)) == [{"kind": 1, "params": [a, c]}, {"kind": 2, "params": [b]}]


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        (
            "module.backbone._fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module._orig_mod.norm",
            "backbone.blocks.0.norm",
        ),
        ("parametrizations.last_layer.weight.original", "last_layer.weight"),
        ("submodule.weight", "submodule.weight"),  # only whole parts of a name are removed
    ],
)
def test_clean_names(name: str, clean: str) -> None:
    assert remove_fsdp_compile_names(name) == clean
