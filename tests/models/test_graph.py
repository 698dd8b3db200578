"""Networks as graphs: ONNX Runtime and torch.export give what the network gives, for any batch and size."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dinov3.models.graph import export_graph
from tests.helpers.backbones import tiny_convnext, tiny_vit
from tests.helpers.graphs import run_onnx

pytest.importorskip("onnxruntime", reason="graphs are checked with ONNX Runtime: dinov3[export]")
pytest.importorskip("onnxscript", reason="ONNX is written with onnxscript: dinov3[export]")

BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: tiny_vit("mlp"),
    "vit_swiglu": lambda: tiny_vit("swiglu"),
    "convnext": tiny_convnext,
}


@pytest.fixture(autouse=True)
def _quiet_exporter() -> Iterator[None]:
    """The exporter warns of its own affairs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_onnx_gives_what_the_backbone_gives(name: str, tmp_path: Path) -> None:
    backbone = BACKBONES[name]().eval()
    path = export_graph(backbone, tmp_path / "backbone.onnx", image_size=(64, 96))
    for shape in ((1, 3, 64, 32), (3, 3, 96, 128)):
        images = torch.randn(shape)
        found, expected = run_onnx(path, images), backbone.forward_features(images)  # type: ignore[operator]
        assert list(found) == ["class_token", "patch_tokens"]
        assert (found["class_token"] - expected["x_norm_clstoken"]).abs().max() < 1e-4
        assert (found["patch_tokens"] - expected["x_norm_patchtokens"]).abs().max() < 1e-4
    assert [file.name for file in tmp_path.iterdir()] == ["backbone.onnx"]


@torch.no_grad()
def test_half_precision_has_float32_ends(tmp_path: Path) -> None:
    backbone = tiny_vit("mlp").eval()
    half = export_graph(backbone, tmp_path / "half.onnx", image_size=(64, 96), half=True)
    assert half.stat().st_size < 0.9 * 4 * sum(value.numel() for value in backbone.parameters())
    images = torch.randn(2, 3, 64, 32)
    found, expected = run_onnx(half, images)["class_token"], backbone(images)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert next(backbone.parameters()).dtype == torch.float32  # the network itself is left alone


@torch.no_grad()
def test_torch_export_gives_what_the_backbone_gives(tmp_path: Path) -> None:
    backbone = tiny_vit("mlp").eval()
    path = export_graph(backbone, tmp_path / "backbone.pt2", "pt2", image_size=(64, 96))
    program = torch.export.load(path).module()
    images = torch.randn(3, 3, 32, 64)
    class_token, patch_tokens = program(images)
    torch.testing.assert_close(class_token, backbone(images), atol=1e-5, rtol=1e-5)
    assert patch_tokens.shape[:2] == (3, 8)


@torch.no_grad()
def test_other_networks_keep_the_names_of_their_outputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"maps": self.conv(x), "mean": self.conv(x).mean((2, 3))}

    network, images = Two(), torch.randn(1, 3, 20, 30)
    found = run_onnx(export_graph(network, tmp_path / "two.onnx", image_size=(16, 24)), images)
    for name, value in network(images).items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of onnx, pt2"):
        export_graph(nn.Conv2d(3, 1, 1), tmp_path / "a", "tflite")
    with pytest.raises(ValueError, match="gives others"):
        export_graph(_Lists(), tmp_path / "a")


class _Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.conv(x)]
