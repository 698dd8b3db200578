"""The towers and the model: what the golden cases don't show."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dinov3.eval.text.dinotxt_model import DINOTxt, DINOTxtConfig
from dinov3.eval.text.text_tower import build_text_backbone, build_text_model
from dinov3.eval.text.text_transformer import TextTransformer
from dinov3.eval.text.vision_tower import build_vision_model
from tests.helpers.backbones import tiny_vit
from tests.helpers.tiny_dinotxt import TEXT_BACKBONE, tiny_dinotxt

TOKENS = torch.tensor([[3, 9, 5, 0, 0], [1, 2, 9, 9, 4]])


def text_backbone(**options: Any) -> TextTransformer:
    return build_text_backbone(TEXT_BACKBONE | options)


def test_causal_tokens_see_only_those_before() -> None:
    later = TOKENS.clone()
    later[:, 3:] += 7
    causal, full = (text_backbone(is_causal=is_causal).eval() for is_causal in (True, False))
    for model in (causal, full):
        model.init_weights()
    torch.testing.assert_close(causal(TOKENS)[:, :3], causal(later)[:, :3])
    assert not torch.allclose(full(TOKENS)[:, :3], full(later)[:, :3])


def test_every_parameter_is_initialised_after_the_meta_device() -> None:
    with torch.device("meta"):
        model = DINOTxt(DINOTxtConfig(256), tiny_vit_on_meta(), text_backbone(ls_init_value=0.1))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(float("nan"))
    model.init_weights()
    wrong = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    assert not wrong
    block = model.text_model.backbone.blocks[0]  # type: ignore[index]
    assert not block.feed_forward.fc1.bias.any()
    assert (block.ls1.gamma == 0.1).all()
    assert model.logit_scale.item() == pytest.approx(2.6593, abs=1e-4)


def tiny_vit_on_meta() -> Any:
    from dinov3.models.vision_transformer import DinoVisionTransformer

    return DinoVisionTransformer(embed_dim=128, depth=1, num_heads=2, ffn_ratio=2, n_storage_tokens=1)


def test_weights_shrink_with_depth() -> None:
    model = text_backbone(dim=96, num_layers=8)
    model.init_weights()
    block: Any = model.blocks[0]
    assert block.feed_forward.fc2.weight.std().item() == pytest.approx((96 * 16) ** -0.5, rel=0.1)
    assert block.attention.qkv.weight.std().item() == pytest.approx(96**-0.5, rel=0.1)


@pytest.mark.parametrize(("pooler", "position"), [("first", [0, 0]), ("last", [4, 4]), ("argmax", [1, 2])])
def test_poolers_take_one_token(pooler: str, position: list[int]) -> None:
    tower = build_text_model(embed_dim=24, backbone=text_backbone(), tokens_pooler_type=pooler).eval()
    every = tower.head(tower.backbone(TOKENS))
    torch.testing.assert_close(tower(TOKENS), every[range(2), position])


def test_frozen_backbones_stay_as_they_are() -> None:
    model = tiny_dinotxt(text_model_freeze_backbone=True).train()
    for tower in (model.visual_model, model.text_model):
        assert tower.head.training
        assert not tower.backbone.training
        assert not any(p.requires_grad for p in tower.backbone.parameters())
        assert all(p.requires_grad for p in tower.head.parameters())
    thawed = tiny_dinotxt(vision_model_freeze_backbone=False).train()
    assert thawed.visual_model.backbone.training
    assert tiny_dinotxt(freeze_logit_scale=True).logit_scale.requires_grad is False


def test_features_are_class_then_pooled_patches() -> None:
    model = tiny_dinotxt()
    images = torch.randn(2, 3, 32, 48)
    features, patches, backbone_patches = model.encode_image_with_patch_tokens(images)
    assert patches.shape == backbone_patches.shape == (2, 6, 128)
    torch.testing.assert_close(features[:, 128:], patches.mean(1))
    unit = model.encode_image(images, normalize=True)
    torch.testing.assert_close(unit, torch.nn.functional.normalize(features, dim=-1))
    single = torch.cat([model.encode_image(image[None]) for image in images])
    torch.testing.assert_close(single, features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("use_class", "use_patches", "width"), [(True, False, 128), (False, True, 128), (True, True, 256)]
)
def test_features_without_projection_have_the_width_of_their_parts(
    use_class: bool, use_patches: bool, width: int
) -> None:
    tower = build_vision_model(
        embed_dim=width, backbone=tiny_vit(), use_class_token=use_class, use_patch_tokens=use_patches
    )
    assert isinstance(tower.head.linear_projection, torch.nn.Identity)
    assert tower(torch.randn(1, 3, 32, 32)).features.shape == (1, width)


def vision(**options: Any) -> Any:
    return build_vision_model(**{"embed_dim": 128, "backbone": tiny_vit()} | options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: build_text_model(embed_dim=8, backbone=text_backbone(), tokens_pooler_type="middle"),
            "'middle'.*argmax",
        ),
        (lambda: vision(patch_tokens_pooler_type="min"), "'min'.*mean, max"),
        (lambda: vision(embed_dim=65, use_patch_tokens=True), "must be even, got 65"),
        (lambda: vision(use_class_token=False), "both are switched off"),
        (lambda: vision(patch_token_layer=0), "beginning with 1, got 0"),
        (lambda: build_text_backbone({"dim": 8}), "lacks context_length, vocab_size"),
        (lambda: text_backbone()(torch.zeros(1, 78, dtype=torch.int64)), "78 tokens, the context holds 77"),
    ],
)
def test_impossible_models_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_backbones_are_built_from_configurations_or_asked_for(tmp_path: Any) -> None:
    with pytest.raises(RuntimeError, match="pass vision_backbone=, or set vision_backbone_config"):
        DINOTxt(DINOTxtConfig(embed_dim=8))
    with pytest.raises(RuntimeError, match="pass text_backbone="):
        DINOTxt(DINOTxtConfig(embed_dim=8), vision_backbone=tiny_vit())
    (tmp_path / "vision.yaml").write_text("student: {arch: vit_nano, patch_size: 8}\ncrops: {global_crops_size: 32}\n")
    (tmp_path / "text.yaml").write_text("\n".join(f"{key}: {value}" for key, value in TEXT_BACKBONE.items()))
    config = SimpleNamespace(
        **vars(DINOTxtConfig(embed_dim=8))
        | {
            "vision_backbone_config": str(tmp_path / "vision.yaml"),
            "text_backbone_config": str(tmp_path / "text.yaml"),
        }
    )
    model = DINOTxt(config, device="meta")
    assert all(value.is_meta for value in model.state_dict().values())
    assert model.visual_model.backbone.patch_size == 8
    assert model.text_model.backbone.vocab_size == 514


def test_similarities_are_compared_in_single_precision() -> None:
    model = tiny_dinotxt().bfloat16()
    output = model(torch.randn(2, 3, 32, 32).bfloat16(), TOKENS)
    assert output.image_features.dtype == output.text_features.dtype == torch.float32
    torch.testing.assert_close(output.text_features.norm(dim=-1), torch.ones(2))
