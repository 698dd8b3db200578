"""Low-rank adapters of the library peft attach to the published module names."""

import warnings

import pytest
import torch

from tests.helpers.backbones import tiny_vit


def test_adapters_learn_while_the_backbone_stays() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports
        peft = pytest.importorskip("peft", reason="adapters come from peft: dinov3[dev]")
    backbone = tiny_vit("mlp")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = backbone.eval()(images)
    config = peft.LoraConfig(r=2, target_modules=["qkv", "proj", "fc1", "fc2"], exclude_modules=["patch_embed.proj"])
    model = peft.get_peft_model(backbone, config)
    with torch.no_grad():
        torch.testing.assert_close(model(images), before)  # adapters start at zero

    model.train()(images).square().mean().backward()

    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    assert any("attn.qkv" in name for name in trained)
