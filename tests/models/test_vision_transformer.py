"""The vision transformer: forms of input, options, errors."""

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

from dinov3.models import vision_transformer
from dinov3.models.backbone import Backbone
from dinov3.models.vision_transformer import DinoVisionTransformer, get_vit_arch, register_vit

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "ffn_ratio": 2.0, "patch_size": 4, "pos_embed_rope_dtype": "fp32"}


def make(**options: object) -> DinoVisionTransformer:
    model = DinoVisionTransformer(**(TINY | {"n_storage_tokens": 2, "layerscale_init": 0.5} | options))
    model.init_weights()
    for value in model.parameters():
        nn.init.normal_(value, std=0.2)  # every parameter matters
    return model.eval()


def test_is_a_backbone() -> None:
    model = make()
    assert isinstance(model, Backbone)
    assert model.embed_dims == [32, 32, 32]
    assert model.stride == 4
    assert model.wrap_units() == list(model.blocks)


def test_shapes_and_keys() -> None:
    features = make().forward_features(torch.randn(2, 3, 8, 12))
    shapes = {key: None if value is None else tuple(value.shape) for key, value in features.items()}
    assert shapes == {
        "x_norm_clstoken": (2, 32),
        "x_storage_tokens": (2, 2, 32),
        "x_norm_patchtokens": (2, 6, 32),
        "x_prenorm": (2, 9, 32),
        "masks": None,
    }


@pytest.mark.parametrize("train", [False, True])
def test_list_equals_one_by_one(train: bool) -> None:
    model = make().train(train)
    images = [torch.randn(2, 3, 8, 12), torch.randn(3, 3, 8, 8), torch.randn(1, 3, 8, 12)]
    masks = [torch.rand(2, 6) > 0.5, None, None]
    for got, x, mask in zip(model(images, masks, is_training=True), images, masks, strict=True):
        want = model.forward_features(x, mask)
        for key in ("x_norm_clstoken", "x_norm_patchtokens", "x_prenorm"):
            torch.testing.assert_close(got[key], want[key], atol=1e-5, rtol=1e-5)
        assert got["masks"] is mask


def test_list_without_masks_and_its_class_tokens() -> None:
    model, images = make(), [torch.randn(2, 3, 8, 12), torch.randn(3, 3, 8, 8)]
    class_tokens = model(images)
    assert isinstance(class_tokens, list)
    for got, x in zip(class_tokens, images, strict=True):
        torch.testing.assert_close(got, model(x), atol=1e-5, rtol=1e-5)


def test_images_do_not_see_each_other() -> None:
    model, images = make(), torch.randn(3, 3, 8, 12)
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]), atol=1e-5, rtol=1e-5)


def test_masked_patches_are_not_seen() -> None:
    model, images = make(), torch.randn(1, 3, 8, 8)
    mask = torch.tensor([[True, False, False, False]])
    changed = images.clone()
    changed[..., :4, :4] += 3
    torch.testing.assert_close(model(images, mask), model(changed, mask))
    assert not torch.allclose(model(images), model(changed))


def test_every_parameter_gets_a_gradient_without_masks_too() -> None:
    model = make().train()
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    assert model.mask_token.grad.abs().max() == 0


def test_local_norm_acts_on_the_second_entry_in_training_only() -> None:
    model = make(untie_global_and_local_cls_norm=True)
    nn.init.zeros_(model.local_cls_norm.weight)
    nn.init.zeros_(model.local_cls_norm.bias)
    images = [torch.randn(2, 3, 8, 8)] * 3
    assert all(token.abs().max() > 0 for token in model(images))
    maxima = [token.abs().max() > 0 for token in model.train()(images)]
    assert maxima == [True, False, True]


def test_random_positions_differ_per_block_and_repeat_with_the_seed() -> None:
    model, images = make(pos_embed_rope_rescale_coords=2.0), torch.randn(1, 3, 8, 8)
    drawn = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: drawn.append(args[1][0][0]))
    model.train()
    torch.manual_seed(1)
    first = model(images)
    assert len({tuple(table.flatten().tolist()) for table in drawn}) == 3
    torch.manual_seed(1)
    assert torch.equal(model(images), first)
    drawn.clear()
    model.eval()(images)
    assert all(table is drawn[0] for table in drawn)  # shared by all blocks


def test_intermediate_layers_are_the_prefixes_of_the_network() -> None:
    model, images = make(), torch.randn(2, 3, 8, 12)
    (patches, cls, extra), last = model.get_intermediate_layers(
        images, n=[1, 2], return_class_token=True, return_extra_tokens=True
    )
    features = model.forward_features(images)
    torch.testing.assert_close(last[0], features["x_norm_patchtokens"])
    torch.testing.assert_close(last[1], features["x_norm_clstoken"])
    torch.testing.assert_close(last[2], features["x_storage_tokens"])
    shorter = make(depth=2)
    shorter.load_state_dict({key: model.state_dict()[key] for key in shorter.state_dict()})
    features = shorter.forward_features(images)
    torch.testing.assert_close(patches, features["x_norm_patchtokens"])
    torch.testing.assert_close(cls, features["x_norm_clstoken"])
    torch.testing.assert_close(extra, features["x_storage_tokens"])


def test_intermediate_layers_come_in_block_order_and_count_from_the_end() -> None:
    model, images = make(), torch.randn(1, 3, 8, 8)
    for got, want in zip(
        model.get_intermediate_layers(images, n=(-1, 0)), model.get_intermediate_layers(images, n=[0, 2]), strict=True
    ):
        assert torch.equal(got, want)


def test_blocks_after_the_last_one_asked_for_are_not_run() -> None:
    model = make()
    model.blocks[2] = None  # would fail
    assert len(model.get_intermediate_layers(torch.randn(1, 3, 8, 8), n=[0, 1])) == 2


def test_maps_are_the_tokens_in_rows() -> None:
    model, images = make(), torch.randn(2, 3, 8, 12)
    (tokens,), (maps,) = (model.get_intermediate_layers(images, reshape=reshape) for reshape in (False, True))
    assert maps.is_contiguous()
    assert torch.equal(maps.flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize(
    ("n", "message"),
    [
        (0, "1 to 3"),
        (4, "1 to 3"),
        ([3], "no blocks"),
        ([1, 1], "distinct"),
        ([1, -2], "distinct"),
        ([], "distinct"),
    ],
)
def test_wrong_layers(n: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().get_intermediate_layers(torch.randn(1, 3, 8, 8), n=n)


def test_images_smaller_than_a_patch() -> None:
    with pytest.raises(ValueError, match="smaller than one patch"):
        make()(torch.randn(1, 3, 8, 3))
    with pytest.raises(ValueError, match="smaller than one patch"):
        make().get_intermediate_layers(torch.randn(1, 3, 3, 8))


def test_wrong_options_and_masks(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="layernormbf16"):
        make(norm_layer="batchnorm")
    with pytest.raises(ValueError, match="swiglu64"):
        make(ffn_layer="swiglu65")
    with pytest.raises(ValueError, match="bf16"):
        make(pos_embed_rope_dtype="float8")
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        make()(torch.randn(2, 3, 8, 8), torch.zeros(2, 5, dtype=torch.bool))
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        make(no_such_option=1)
    assert "no_such_option" in caplog.text


def test_initialisation_after_the_meta_device_leaves_nothing_undefined() -> None:
    options = {"mask_k_bias": True, "untie_cls_and_patch_norms": True, "untie_global_and_local_cls_norm": True}
    options |= {"n_storage_tokens": 2, "layerscale_init": 1e-5, "device": "meta"}
    model = DinoVisionTransformer(**(TINY | options))
    assert all(value.is_meta for value in model.state_dict().values())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(float("nan"))
    model.init_weights()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert (model.blocks[0].ls1.gamma == 1e-5).all()
    assert model.mask_token.abs().max() == 0
    assert model.eval()(torch.randn(1, 3, 8, 8)).isfinite().all()


def test_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_vit_arch("vit_small") is vision_transformer.vit_small
    monkeypatch.setattr(vision_transformer, "vit_by_attribute", make, raising=False)
    assert get_vit_arch("vit_by_attribute") is make
    register_vit("my_vit_size", make)
    assert get_vit_arch("my_vit_size") is make
    del vision_transformer.my_vit_size
    for name in ("vit_none", "init_weights_vit", "Any", "register_vit"):
        with pytest.raises(NotImplementedError, match="vit_7b"):
            get_vit_arch(name)
    with pytest.raises(ValueError, match="'vit'"):
        register_vit("resnet", make)


def test_named_sizes_take_overrides() -> None:
    model = vision_transformer.vit_large(patch_size=8, depth=1, ffn_ratio=6, device="meta")
    assert (model.embed_dim, model.n_blocks, model.patch_size) == (1024, 1, 8)
    assert model.blocks[0].mlp.fc1.out_features == 6144


def test_whole_model_and_blocks_trace_without_graph_breaks() -> None:
    model, images = make(), torch.randn(1, 3, 8, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


def test_export_gives_the_same_class_tokens() -> None:
    model, images = make(), torch.randn(1, 3, 8, 8)
    model(images)  # what was kept from an earlier call must not end up in the graph
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images))


def test_models_import_with_torch_alone() -> None:
    blocked = ("numpy", "torchvision", "omegaconf", "submitit", "safetensors", "torchmetrics", "sklearn")
    code = (
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "import torch, dinov3.layers, dinov3.models.convnext, dinov3.models.features\n"
        "from dinov3.models.vision_transformer import vit_small\n"
        "from dinov3.models.convnext import get_convnext_arch\n"
        "for model in (vit_small(depth=1), get_convnext_arch('convnext_tiny')(depths=[1, 1, 1, 1])):\n"
        "    model.init_weights()\n"
        "    model.eval()(torch.zeros(1, 3, 32, 32))\n"
        "assert not any(name.startswith('dinov3.checkpointer') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [{}, {"untie_cls_and_patch_norms": True, "untie_global_and_local_cls_norm": True}])
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_chosen_patches_are_those_of_all(options: dict[str, bool], drop_path_rate: float) -> None:
    model = make(drop_path_rate=drop_path_rate, **options).train()
    images = [torch.randn(4, 3, 8, 12), torch.randn(3, 3, 8, 8)]
    indices = [torch.tensor([13, 0, 7]), torch.tensor([], dtype=torch.int64)]
    torch.manual_seed(0)
    everything = model(images, is_training=True)
    torch.manual_seed(0)  # the same samples skip branches
    chosen = model(images, is_training=True, patch_indices=indices)
    for got, want, patches in zip(chosen, everything, indices, strict=True):
        torch.testing.assert_close(got["x_norm_clstoken"], want["x_norm_clstoken"])
        torch.testing.assert_close(got["x_norm_patchtokens"], want["x_norm_patchtokens"].flatten(0, 1)[patches])
