"""Backbones on an accelerator against the same backbones on the CPU."""

import copy

import pytest
import torch
from torch import nn

from dinov3.layers import convert_linears_to_fp8
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer
from dinov3.utils.device import default_device

pytestmark = pytest.mark.gpu


def make_vit() -> DinoVisionTransformer:
    model = DinoVisionTransformer(
        embed_dim=128, depth=2, num_heads=2, patch_size=8, n_storage_tokens=2, mask_k_bias=True, layerscale_init=0.5
    )
    model.init_weights()
    return model.eval()


@pytest.mark.parametrize("make", [make_vit, lambda: ConvNeXt(depths=[1, 1, 1, 1], dims=[8, 16, 24, 32]).eval()])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 5e-2)])
def test_equals_the_cpu(make, dtype: torch.dtype, tolerance: float) -> None:
    model, images, device = make(), torch.randn(2, 3, 64, 96), default_device()
    with torch.no_grad():
        expected = model(images)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            got = copy.deepcopy(model).to(device)(images.to(device))
    assert got.device.type == device.type
    assert (got.float().cpu() - expected).norm() / expected.norm() < tolerance


def test_gradients_reach_every_parameter() -> None:
    model = make_vit().to(default_device()).train()
    images = torch.randn(2, 3, 64, 96, device=default_device())
    outputs = model.forward_features([images, images[..., :32, :32]])
    sum(
        output["x_norm_patchtokens"].square().mean() + output["x_norm_clstoken"].mean() for output in outputs
    ).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_fp8_product_equals_the_cpu() -> None:
    linear, x = nn.Linear(128, 192), torch.randn(32, 128)
    fp8 = convert_linears_to_fp8(nn.Sequential(linear), filter="0")
    expected = fp8(x)
    got = copy.deepcopy(fp8).to(default_device())(x.to(default_device()))
    torch.testing.assert_close(got.cpu(), expected, atol=2e-2, rtol=2e-2)
