"""Hugging Face and timm layouts, against these libraries themselves."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.checkpointer.export import hf_config
from dinov3.checkpointer.layouts import Layout, recognise, rope_periods, to_hf, to_meta, to_timm
from dinov3.hub.loading import load_backbone
from tests.golden.fill import fill
from tests.helpers.backbones import VITS, assert_states_equal, tiny_convnext, tiny_vit

# What the issue allows between equally good float32 computations.
MAX_ABS, MAX_REL_RMS = 1e-5, 2e-6


def assert_outputs_equal(got: Tensor, want: Tensor) -> None:
    gap = (got.double() - want.double()).abs()
    assert gap.max() <= MAX_ABS * max(1.0, want.abs().max().item())
    assert gap.square().mean().sqrt() <= MAX_REL_RMS * want.double().square().mean().sqrt()


def images(height: int = 64, width: int = 48) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(3))


def hf_module(model: nn.Module) -> nn.Module:
    """transformers' model with our weights, loaded strictly but for the prefix it puts into names in memory."""
    import transformers

    config = hf_config(model)
    architecture = config["architectures"][0]
    module = getattr(transformers, architecture)(
        getattr(transformers, architecture.replace("Model", "Config"))(**config)
    )
    names = {name.removeprefix("model."): name for name in module.state_dict()}
    state = to_hf(model.state_dict())
    assert set(state) == set(names)
    module.load_state_dict({names[key]: value for key, value in state.items()})
    return module.eval()


def timm_vit(model: nn.Module, kind: str) -> nn.Module:
    import timm

    gated, qkv_bias = "swiglu" in VITS[kind].get("ffn_layer", "mlp"), VITS[kind].get("qkv_bias", True)
    name = {
        (False, True): "vit_small_patch16_dinov3_qkvb",
        (True, True): "vit_small_plus_patch16_dinov3_qkvb",
        (True, False): "vit_7b_patch16_dinov3",
    }[gated, qkv_bias]
    hidden = next(value for key, value in model.state_dict().items() if key.endswith(("w1.weight", "fc1.weight")))
    return timm.create_model(
        name,
        num_classes=0,
        embed_dim=model.embed_dim,
        depth=model.n_blocks,
        num_heads=model.num_heads,
        mlp_ratio=hidden.shape[0] / model.embed_dim,
        num_reg_tokens=model.n_storage_tokens,
        dynamic_img_size=True,
        global_pool="token",
    ).eval()


def exact_periods(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.rope_embed.periods.copy_(rope_periods(len(model.rope_embed.periods), 100.0))
    return model


# --- Against transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VITS)
@torch.no_grad()
def test_vit_equals_transformers(kind: str) -> None:
    model = exact_periods(tiny_vit(kind))
    features, theirs = model.forward_features(images()), hf_module(model)(images(), output_hidden_states=True)
    ours = torch.cat(
        [features["x_norm_clstoken"][:, None], features["x_storage_tokens"], features["x_norm_patchtokens"]], 1
    )
    assert_outputs_equal(ours, theirs.last_hidden_state)
    assert_outputs_equal(features["x_norm_clstoken"], theirs.pooler_output)
    first = model.get_intermediate_layers(images(), n=[0], return_class_token=True, norm=False)[0]
    assert_outputs_equal(first[0], theirs.hidden_states[1][:, 1 + model.n_storage_tokens :])
    assert_outputs_equal(first[1], theirs.hidden_states[1][:, 0])


@torch.no_grad()
def test_masked_vit_equals_transformers() -> None:
    model, masks = exact_periods(tiny_vit()), torch.rand(2, 12) > 0.5
    theirs = hf_module(model)(images(), bool_masked_pos=masks).last_hidden_state
    assert_outputs_equal(model.forward_features(images(), masks)["x_norm_patchtokens"], theirs[:, 5:])


@pytest.mark.parametrize("size", [(64, 48), (70, 101)])
@torch.no_grad()
def test_convnext_equals_transformers(size: tuple[int, int]) -> None:
    model = tiny_convnext()
    features, theirs = model.forward_features(images(*size)), hf_module(model)(images(*size))
    ours = torch.cat([features["x_norm_clstoken"][:, None], features["x_norm_patchtokens"]], 1)
    assert_outputs_equal(ours, theirs.last_hidden_state)


# --- Against timm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "swiglu", "like_7b"])
@torch.no_grad()
def test_vit_equals_timm(kind: str) -> None:
    model = exact_periods(tiny_vit(kind))
    theirs = timm_vit(model, kind)
    theirs.load_state_dict(to_timm(model.state_dict()))
    assert_outputs_equal(model(images()), theirs(images()))
    assert_outputs_equal(
        model.forward_features(images())["x_norm_patchtokens"], theirs.forward_features(images())[:, 5:]
    )


@torch.no_grad()
def test_convnext_equals_timm() -> None:
    import timm

    model = tiny_convnext()
    theirs = timm.create_model(
        "convnext_tiny.dinov3_lvd1689m", num_classes=0, depths=(1, 2, 1, 1), dims=(8, 12, 16, 24)
    )
    theirs.load_state_dict(to_timm(model.state_dict()))
    assert_outputs_equal(model(images()), theirs.eval()(images()))


# --- There and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VITS)
def test_hugging_face_and_back(kind: str) -> None:
    model = tiny_vit(kind)
    state = model.state_dict()
    if "blocks.0.attn.qkv.bias" in state:
        for block in model.blocks:  # the key part does nothing, and the other layout does not keep it
            block.attn.qkv.bias.data.chunk(3)[1].zero_()
    other = to_hf(state)
    assert recognise(other) is Layout.HF_VIT
    back = to_meta(other, like=state)
    assert_states_equal(back, {key: state[key] for key in back})
    assert back.keys() == state.keys()


def test_hugging_face_names_as_transformers_has_them_in_memory() -> None:
    model = tiny_convnext()
    other = {f"model.{key}" if key.startswith("stages.") else key: v for key, v in to_hf(model.state_dict()).items()}
    assert recognise(other) is Layout.HF_CONVNEXT
    back = to_meta(other)
    assert_states_equal(back, {key: model.state_dict()[key] for key in back})
    assert back.keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", ["mlp", "swiglu", "like_7b"])
def test_timm_and_back(kind: str) -> None:
    model = tiny_vit(kind)
    model.mask_token.data.zero_()  # timm has none
    for block in model.blocks:
        if block.attn.qkv.bias is not None:
            block.attn.qkv.bias.data.chunk(3)[1].zero_()
    other = to_timm(model.state_dict())
    assert recognise(other) is Layout.TIMM_VIT
    assert_states_equal(
        dict(sorted(to_meta(other, like=model.state_dict()).items())), dict(sorted(model.state_dict().items()))
    )


def test_timm_convnext_and_back() -> None:
    model = tiny_convnext()
    other = to_timm(model.state_dict())
    assert recognise(other) is Layout.TIMM_CONVNEXT
    back = to_meta(other)
    assert_states_equal(dict(sorted(back.items())), dict(sorted(model.state_dict().items())))


def test_timm_without_qkv_bias_gives_a_bias_of_zero_where_the_model_has_one() -> None:
    model = tiny_vit()
    plain = {key: value for key, value in to_timm(model.state_dict()).items() if not key.endswith(("q_bias", "v_bias"))}
    assert "blocks.0.attn.qkv.bias" not in to_meta(plain)
    state = to_meta(plain, like=model.state_dict())
    assert state["blocks.1.attn.qkv.bias"].eq(0).all()
    assert state["blocks.1.attn.qkv.bias_mask"].chunk(3)[1].eq(0).all()


def test_local_norm_is_a_copy_of_the_norm_where_the_model_has_one() -> None:
    model = tiny_vit(untie_global_and_local_cls_norm=True)
    state = to_meta(to_hf(model.state_dict()), like=model.state_dict())
    assert state["local_cls_norm.weight"].equal(state["norm.weight"])
    assert state["local_cls_norm.weight"].data_ptr() != state["norm.weight"].data_ptr()
    assert "local_cls_norm.weight" not in to_meta(to_hf(model.state_dict()))


# --- RoPE periods ----------------------------------------------------------------------------------------------------

# `models.md` 6.1: the values in the released files of heads with 64 channels.
RELEASED = [
    1,
    1.3359375,
    1.78125,
    2.375,
    3.15625,
    4.21875,
    5.625,
    7.5,
    10,
    13.3125,
    17.75,
    23.75,
    31.625,
    42.25,
    56.25,
    75,
]


def test_periods_are_those_of_the_released_files_unless_exact_ones_are_wanted() -> None:
    state = to_hf(tiny_vit().state_dict())
    assert to_meta(state)["rope_embed.periods"].tolist() == RELEASED
    exact = to_meta(state, round_periods=False)["rope_embed.periods"].double()
    torch.testing.assert_close(exact, 100 ** (torch.arange(16, dtype=torch.float64) / 16), rtol=1e-6, atol=0)


@pytest.mark.parametrize("extra", [{"rope_theta": 10.0}, {"rope_parameters": {"rope_theta": 10.0}}])
def test_periods_follow_the_configuration(extra: dict[str, Any]) -> None:
    state = to_meta(to_hf(tiny_vit().state_dict()), config={"num_attention_heads": 4} | extra, round_periods=False)
    torch.testing.assert_close(state["rope_embed.periods"], rope_periods(8, 10.0), rtol=1e-6, atol=0)


def test_rounded_periods_change_little_but_something() -> None:
    model = tiny_vit()
    with torch.no_grad():
        rounded, exact = model(images()), exact_periods(model)(images())
    gap = (rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-5 < gap < 2e-3


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_unknown_names_are_an_error() -> None:
    state = to_hf(tiny_vit().state_dict()) | {"classifier.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"hf-vit.*classifier\.weight"):
        to_meta(state)


def test_half_a_qkv_is_an_error() -> None:
    state = to_hf(tiny_vit().state_dict())
    with pytest.raises(ValueError, match="no weight for k"):
        to_meta({key: value for key, value in state.items() if key != "layer.1.attention.k_proj.weight"})
    with pytest.raises(ValueError, match="query and value"):
        to_meta({key: value for key, value in state.items() if key != "layer.1.attention.v_proj.bias"})


def test_models_without_a_counterpart_are_refused() -> None:
    with pytest.raises(ValueError, match="cls_norm"):
        to_hf(tiny_vit(untie_cls_and_patch_norms=True).state_dict())
    with pytest.raises(ValueError, match="rmsnorm"):
        to_timm(tiny_vit(norm_layer="rmsnorm").state_dict())
    with pytest.raises(ValueError, match="key bias"):
        to_timm(tiny_vit(mask_k_bias=False).state_dict())
    model = tiny_vit()
    model.blocks[0].attn.qkv.bias_mask.fill_(float("nan"))
    with pytest.raises(ValueError, match="bias_mask"):
        to_hf(model.state_dict())
    for options, reason in (
        ({"pos_embed_rope_normalize_coords": "max"}, "normalised separately"),
        ({"pos_embed_rope_base": None, "pos_embed_rope_min_period": 1, "pos_embed_rope_max_period": 9}, "base"),
    ):
        with pytest.raises(ValueError, match=reason):
            hf_config(tiny_vit(**options))


def test_an_unmasked_key_bias_is_kept() -> None:
    model = tiny_vit(mask_k_bias=False)
    state = to_hf(model.state_dict())
    assert hf_config(model)["key_bias"]
    assert_states_equal(dict(sorted(to_meta(state).items())), dict(sorted(model.state_dict().items())))


def test_no_layer_scale_is_a_layer_scale_of_one() -> None:
    assert to_hf(tiny_vit(layerscale_init=None).state_dict())["layer.1.layer_scale2.lambda1"].eq(1).all()


# --- Real sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "timm_name", "size"),
    [
        ("dinov3_vits16", "vit_small_patch16_dinov3_qkvb", (224, 224)),
        ("dinov3_vits16plus", "vit_small_plus_patch16_dinov3_qkvb", (224, 160)),
        ("dinov3_convnext_tiny", "convnext_tiny.dinov3_lvd1689m", (230, 190)),
    ],
)
@torch.no_grad()
def test_released_sizes_equal_transformers_and_timm(name: str, timm_name: str, size: tuple[int, int]) -> None:
    import timm

    model = fill(load_backbone(name, pretrained=False)).eval()
    vit = hasattr(model, "rope_embed")
    x = images(*size)[:1]
    features, theirs = model.forward_features(x), hf_module(model)(x)
    assert_outputs_equal(features["x_norm_clstoken"], theirs.pooler_output)
    assert_outputs_equal(features["x_norm_patchtokens"], theirs.last_hidden_state[:, 5 if vit else 1 :])
    options = {"dynamic_img_size": True, "global_pool": "token"} if vit else {}
    other = timm.create_model(timm_name, num_classes=0, **options).eval()
    other.load_state_dict(to_timm(model.state_dict()))
    assert_outputs_equal(model(x), other(x))
