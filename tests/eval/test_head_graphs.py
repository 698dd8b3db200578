"""Heads as graphs: ONNX Runtime gives what the models give, for batches and sizes that weren't recorded."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dinov3.checkpointer.heads import HeadFile, save_head
from dinov3.eval.depth.models import build_depther
from dinov3.eval.detection.models.detr import PostProcess
from dinov3.eval.detection.models.processor import DetectorWithProcessor, one_to_one
from dinov3.eval.segmentation.models import build_segmentation_decoder, head_state
from dinov3.eval.segmentation.models.heads import mask2former_head
from dinov3.eval.segmentation.models.utils.ms_deform_attn import MSDeformAttn
from dinov3.eval.segmentation.models.utils.reference_points import cell_centres
from dinov3.hub.classifiers import LinearClassifier
from dinov3.models.features import BackboneLayersSet
from dinov3.models.graph import export_graph, export_text_graph
from dinov3.run import export
from tests.eval.detection.tiny import tiny_detector
from tests.eval.segmentation.toys import tiny_backbone
from tests.helpers.graphs import run_onnx
from tests.helpers.tiny_dinotxt import VOCAB_SIZE, tiny_dinotxt

onnx = pytest.importorskip("onnx", reason="graphs are checked with ONNX: dinov3[export]")
pytest.importorskip("onnxruntime", reason="graphs are checked with ONNX Runtime: dinov3[export]")
pytest.importorskip("onnxscript", reason="ONNX is written with onnxscript: dinov3[export]")

_DPT = {"channels": 8, "post_process_channels": [8] * 4, "n_hidden_channels": 8}


def _linear() -> nn.Module:
    return build_segmentation_decoder(tiny_backbone(), num_classes=5)


def _depth(head_type: str, **options: object) -> nn.Module:
    return build_depther(tiny_backbone(), BackboneLayersSet.FOUR_EVEN_INTERVALS, 16, head_type=head_type, **options)


def _classifier() -> nn.Module:
    torch.manual_seed(0)
    return LinearClassifier(tiny_backbone(), 7)


HEADS: dict[str, tuple[list[str], Callable[[], nn.Module]]] = {
    "segmentation": (["logits"], _linear),
    "linear_depth": (["depth"], lambda: _depth("linear", use_cls_token=True)),
    "dpt": (["depth"], lambda: _depth("dpt", use_cls_token=True, use_batchnorm=True, **_DPT)),
    "classifier": (["logits"], _classifier),
    "vision_tower": (["image_features", "patch_tokens"], lambda: tiny_dinotxt().visual_model),
}
# Sides are no multiples of the patch where the model enlarges or pads images; odd numbers of patches.
SHAPES = ((1, 3, 64, 48), (3, 3, 75, 130))


@pytest.fixture(autouse=True)
def _quiet_exporter() -> Iterator[None]:
    """The exporter warns of its own affairs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def _check(model: nn.Module, path: Path, names: list[str], tolerance: float = 1e-4) -> None:
    for shape in SHAPES:
        images = torch.randn(shape)
        found, expected = run_onnx(path, images), model.graph_outputs(images)  # type: ignore[operator]
        assert list(found) == list(expected) == names
        for name in names:
            assert found[name].shape == expected[name].shape
            assert (found[name] - expected[name]).abs().max() < tolerance


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "segmentation" else pytest.mark.slow) for name in HEADS],
)
def test_onnx_gives_what_the_model_gives(name: str, tmp_path: Path) -> None:
    names, make = HEADS[name]
    model = make().eval()
    _check(model, export_graph(model, tmp_path / "head.onnx", image_size=(70, 100)), names)


@pytest.fixture
def small_mask2former(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Three layers, one for each scale, instead of nine; one of the encoder's six."""
    monkeypatch.setattr(mask2former_head, "N_ENCODER_LAYERS", 1)
    monkeypatch.setattr(mask2former_head, "N_DECODER_LAYERS", 3)
    monkeypatch.setattr(mask2former_head, "DIM_FEEDFORWARD", 64)
    torch.manual_seed(0)
    return build_segmentation_decoder(tiny_backbone(), decoder_type="m2f", hidden_dim=32, num_classes=5).eval()


@pytest.mark.slow
def test_onnx_gives_what_mask2former_gives(small_mask2former: nn.Module, tmp_path: Path) -> None:
    path = export_graph(small_mask2former, tmp_path / "head.onnx", image_size=(70, 100))
    _check(small_mask2former, path, ["pred_logits", "pred_masks"])


class _Deformable(nn.Module):
    """Deformable attention between the cells of two levels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.coarse = nn.Conv2d(3, 64, 8, stride=8), nn.Conv2d(3, 64, 16, stride=16)
        self.attention = MSDeformAttn(64, n_levels=2, n_heads=2, n_points=2)
        for parameter in self.attention.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, images: Tensor) -> Tensor:
        maps = [self.fine(images), self.coarse(images)]
        sizes = [(one.shape[-2], one.shape[-1]) for one in maps]
        cells = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], dim=1)
        out: Tensor = self.attention(cells, cell_centres(sizes, images.device), cells, sizes)
        return out


@torch.no_grad()
def test_deformable_attention_is_recorded_as_gathers(tmp_path: Path) -> None:
    """Equal to the form with torch's sampling; points lie inside and outside of the maps."""
    model = _Deformable().eval()
    path = export_graph(model, tmp_path / "attention.onnx", image_size=(48, 64))
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert "Gather" in operators
    assert "GridSample" not in operators
    for shape in ((1, 3, 64, 32), (3, 3, 32, 96)):
        images = torch.randn(shape)
        assert (run_onnx(path, images)["output"] - model(images)).abs().max() < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_text_tower(tmp_path: Path) -> None:
    tower = tiny_dinotxt().text_model
    path = export_text_graph(tower, tmp_path / "text.onnx")
    for n in (1, 3):
        tokens = torch.randint(VOCAB_SIZE, (n, 77))
        found = run_onnx(path, tokens, "tokens")
        assert list(found) == ["text_features"]
        assert (found["text_features"] - tower(tokens)).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("windows", [0, 3])
@torch.no_grad()
def test_detector(windows: int, tmp_path: Path) -> None:
    """Windows and proposals are those of one size; the batch is open."""
    torch.manual_seed(0)
    detector = one_to_one(tiny_detector(n_windows_sqrt=windows))
    model = DetectorWithProcessor(detector, PostProcess(20)).eval()
    path = export_graph(model, tmp_path / "detector.onnx", image_size=(96, 160))
    for n in (1, 3):
        images = torch.randn(n, 3, 96, 160)
        found, each = run_onnx(path, images), model(list(images))
        for i, expected in enumerate(each):
            assert torch.equal(found["labels"][i], expected["labels"])
            torch.testing.assert_close(found["scores"][i], expected["scores"], atol=1e-4, rtol=0)
            torch.testing.assert_close(found["boxes"][i], expected["boxes"], atol=1e-2, rtol=0)  # pixels


@torch.no_grad()
def test_half_is_the_backbone_and_the_head_stays_in_float32(tmp_path: Path) -> None:
    model = HEADS["dpt"][1]().eval()
    path = export_graph(model, tmp_path / "half.pt2", "pt2", image_size=(70, 100), half=True)
    program = torch.export.load(path).module()
    dtypes = {name: value.dtype for name, value in program.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".encoder." in name} == {torch.float16}
    assert {dtype for name, dtype in dtypes.items() if ".decoder." in name} == {torch.float32}
    images = torch.randn(3, 3, 64, 48)
    (found,), expected = program(images), model.graph_outputs(images)["depth"]  # type: ignore[operator]
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert next(model.parameters()).dtype == torch.float32  # the model itself is left alone


@torch.no_grad()
def test_the_command_takes_head_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(tiny_backbone().state_dict(), tmp_path / "backbone.pth")
    decoder = build_segmentation_decoder(tiny_backbone(), num_classes=5).eval()
    config = {"decoder": {"backbone_out_layers": "FOUR_EVEN_INTERVALS", "num_classes": 5, "autocast_dtype": "float32"}}
    save_head(tmp_path / "head.pth", HeadFile("segmentation", head_state(decoder), config, "dinov3_vits16"))
    monkeypatch.setattr("dinov3.hub.heads.load_backbone", lambda name, weights: tiny_backbone())
    arguments = [str(tmp_path), "--backbone-weights", str(tmp_path / "backbone.pth")]
    written = export.main([*arguments, "--format", "pt2"])
    assert written == tmp_path / "head.pt2"
    images = torch.randn(1, 3, 64, 48)
    (found,) = torch.export.load(written).module()(images)
    torch.testing.assert_close(found, decoder.predict(images, (64, 48)), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="is a trained head: it is written as onnx or pt2, not as meta"):
        export.main(arguments)
