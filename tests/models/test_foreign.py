"""Models of timm and torchvision behind the backbone protocol."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from dinov3.models.backbone import Backbone
from dinov3.models.foreign import ForeignBackbone


@pytest.mark.parametrize(
    ("name", "width", "stride"),
    [
        ("torchvision:resnet18", 512, 32),
        ("torchvision:resnet18/layer3", 256, 16),
        ("torchvision:mobilenet_v3_small", 576, 32),
        ("timm:resnet10t", 512, 32),
        ("timm:vit_tiny_patch16_224", 192, 16),
        ("timm:test_convnext", 64, 32),
    ],
)
def test_features_have_the_shapes_of_the_protocol(name: str, width: int, stride: int) -> None:
    backbone = ForeignBackbone.from_name(name).eval()
    assert isinstance(backbone, Backbone)
    assert (backbone.embed_dim, backbone.embed_dims, backbone.stride) == (width, [width], stride)
    with torch.no_grad():
        found, small = backbone([torch.randn(2, 3, 224, 224), torch.randn(1, 3, 224, 224)], is_training=True)
        n = (224 // stride) ** 2
        assert found["x_norm_clstoken"].shape == (2, width)
        assert found["x_norm_patchtokens"].shape == (2, n, width)
        assert found["x_storage_tokens"].shape == (2, 0, width)
        assert small["x_norm_patchtokens"].shape == (1, n, width)


def test_a_feature_map_becomes_patches_row_by_row_and_its_mean_the_class_token() -> None:
    backbone = ForeignBackbone.from_name("torchvision:resnet18").eval()
    images = torch.randn(2, 3, 64, 96)
    children = dict(backbone.model.named_children())
    with torch.no_grad():
        expected = images
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            expected = children[name](expected)
        ((maps, cls),) = backbone.get_intermediate_layers(images, reshape=True, return_class_token=True)
        tokens = backbone.forward_features(images)["x_norm_patchtokens"]
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(tokens[0, 1], expected[0, :, 0, 1])
    torch.testing.assert_close(cls, expected.mean(dim=(2, 3)))
    torch.testing.assert_close(backbone(images), cls)


def test_maps_with_channels_last_and_class_tokens_are_told_apart() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 16, stride=16)

        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).permute(0, 2, 3, 1)

    backbone = ForeignBackbone(Last)
    assert (backbone.embed_dim, backbone.stride, backbone.channels_last) == (5, 16, True)
    images = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(backbone.get_intermediate_layers(images, reshape=True)[0], backbone.model.conv(images))
    vit = ForeignBackbone.from_name("timm:vit_tiny_patch16_224").eval()
    with torch.no_grad():
        tokens = vit.model.forward_features(torch.ones(1, 3, 224, 224))
        torch.testing.assert_close(vit(torch.ones(1, 3, 224, 224)), tokens[:, 0])


def test_weights_keep_the_names_of_the_library_and_survive_the_meta_device() -> None:
    backbone = ForeignBackbone.from_name("torchvision:resnet18", device="meta")
    assert all(value.is_meta for value in backbone.state_dict().values())
    backbone.to_empty(device="cpu")
    for tensor in (*backbone.parameters(), *backbone.buffers()):
        tensor.data.fill_(7)
    backbone.init_weights()
    assert backbone.model.bn1.running_var.eq(1).all()
    assert backbone.model.bn1.num_batches_tracked == 0
    torchvision.models.resnet18().load_state_dict(backbone.model.state_dict(), strict=True)


def test_buffers_outside_the_state_dict_come_back_too() -> None:
    backbone = ForeignBackbone.from_name("timm:swin_tiny_patch4_window7_224", device="meta")
    assert (backbone.embed_dim, backbone.stride, backbone.channels_last) == (768, 32, True)
    backbone.to_empty(device="cpu")
    backbone.reset_buffers()
    fresh = timm.create_model("swin_tiny_patch4_window7_224")
    name = "layers.0.blocks.0.attn.relative_position_index"
    assert name not in fresh.state_dict()
    assert torch.equal(backbone.model.get_buffer(name), fresh.get_buffer(name))


def test_lower_precision_images_are_computed_by_autocast() -> None:
    backbone = ForeignBackbone.from_name("timm:test_convnext").eval()
    with torch.no_grad():
        found = backbone(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16), is_training=True)
    assert found["x_norm_patchtokens"].isfinite().all()
    assert next(backbone.parameters()).dtype is torch.float32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("keras:resnet", "expected timm:<model> or torchvision:<model>"),
        ("timm:no_such_model", "timm has no model 'no_such_model'"),
        ("torchvision:no_such_model", "torchvision has no model 'no_such_model'"),
        ("torchvision:mnasnet0_5", "which layer of torchvision:mnasnet0_5.*one of layers"),
        ("torchvision:resnet18/fc", r"the layer fc gives \[1, 1000\]"),
    ],
)
def test_what_cannot_be_adapted_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForeignBackbone.from_name(name)


def test_masks_and_other_layers_are_refused() -> None:
    backbone = ForeignBackbone.from_name("timm:test_convnext")
    with pytest.raises(ValueError, match="no mask token"):
        backbone(torch.zeros(1, 3, 64, 64), masks=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="last 2 blocks"):
        backbone.get_intermediate_layers(torch.zeros(1, 3, 64, 64), n=2)
