"""Entry points: options, modes, which weights are taken, and what goes wrong."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hubconf
from dinov3.checkpointer.export import export_backbone
from dinov3.checkpointer.sources import DownloadError
from dinov3.hub import backbones, registry
from dinov3.hub.backbones import (
    Weights,
    convert_path_or_url_to_url,
    dinov3_convnext_tiny,
    dinov3_vit7b16,
    dinov3_vitl16,
    dinov3_vits16,
    dinov3_vits16plus,
    is_url,
)
from dinov3.hub.loading import load_backbone
from dinov3.hub.registry import BACKBONES, NORMALIZATIONS
from tests.golden.fill import fill
from tests.helpers.backbones import assert_states_equal, tiny_vit
from tests.helpers.server import Answer, Server
from tests.helpers.source import ROOT

# Any entry point, small enough for a test.
TINY = {"embed_dim": 64, "depth": 1, "num_heads": 1}
TINY_7B = {"embed_dim": 128, "depth": 1, "num_heads": 1}
TINY_CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}


def random_model(entry: Any, **options: Any) -> nn.Module:
    return fill(entry(pretrained=False, **options)).eval()


# --- The table -------------------------------------------------------------------------------------------------------


def test_every_row_is_an_entry_point_of_torch_hub() -> None:
    assert all(getattr(hubconf, name) is getattr(backbones, name) for name in BACKBONES)
    entries = {name for name in vars(hubconf) if name.startswith("dinov3_")}
    assert set(BACKBONES) == {name for name in entries if getattr(hubconf, name).__module__ == backbones.__name__}
    assert set(hubconf.__all__) == entries
    assert hubconf.dependencies == ["torch"]


def test_addresses_of_released_files() -> None:
    base = "https://dl.fbaipublicfiles.com/dinov3"
    large, huge = BACKBONES["dinov3_vitl16"], BACKBONES["dinov3_vith16plus"]
    assert (
        large.url(Weights.SAT493M, hash="eadcf0ff")
        == f"{base}/dinov3_vitl16/dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"
    )
    assert large.url(Weights.LVD1689M, hash="", version="v2").endswith("dinov3_vitl16_pretrain_lvd1689m.pth")
    assert huge.url(Weights.LVD1689M, hash="ab", version="v2").endswith("dinov3_vith16plus_pretrain_lvd1689m_v2-ab.pth")
    assert all(len(hash) == 8 for entry in BACKBONES.values() for hash in entry.hashes.values())


def test_names_on_hugging_face() -> None:
    names = [name for entry in BACKBONES.values() for name in entry.hugging_face_names()]
    models = ["vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16"]
    models += [f"convnext-{size}" for size in ("tiny", "small", "base", "large")]
    want = [f"facebook/dinov3-{model}-pretrain-lvd1689m" for model in models]
    want += [f"facebook/dinov3-{model}-pretrain-sat493m" for model in ("vitl16", "vit7b16")]
    assert sorted(names) == sorted(want)


@pytest.mark.parametrize("name", [name for name in BACKBONES if "convnext" not in name])
def test_what_all_released_vision_transformers_share(name: str) -> None:
    model = load_backbone(name, pretrained=False, depth=1, device="meta")
    rope = model.rope_embed
    assert (rope.base, rope.normalize_coords, rope.dtype) == (100.0, "separate", torch.float32)
    assert (rope.shift_coords, rope.jitter_coords, rope.rescale_coords) == (None, None, 2.0)
    assert (model.patch_size, model.n_storage_tokens) == (16, 4)
    assert model.norm.eps == 1e-5
    assert model.cls_norm is None
    assert (model.blocks[0].attn.qkv.bias is None) is (name == "dinov3_vit7b16")


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://a/b.pth", True),
        ("http://a/b.pth", True),
        ("file:///a/b.pth", True),
        ("/a/b.pth", False),
        ("a/b.pth", False),
        ("~/b.pth", False),
        ("s3://a/b", False),
    ],
)
def test_is_url(text: str, url: bool) -> None:
    assert is_url(text) is url


def test_paths_become_addresses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert convert_path_or_url_to_url("https://a/b.pth") == "https://a/b.pth"
    for path in ("~/b.pth", "b.pth", str(tmp_path / "b.pth"), "x/../b.pth"):
        assert convert_path_or_url_to_url(path) == (tmp_path / "b.pth").resolve().as_uri()


# --- Models without weights ------------------------------------------------------------------------------------------


def test_random_models_are_in_training_mode_and_initialised() -> None:
    model = dinov3_vits16(pretrained=False, depth=1)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.blocks[0].ls1.gamma.eq(1e-5).all()
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_options_of_the_user_win() -> None:
    model = dinov3_vits16(pretrained=False, depth=1, n_storage_tokens=0, img_size=512, drop_path_rate=0.3)
    assert (model.n_blocks, model.n_storage_tokens, model.embed_dim) == (1, 0, 384)
    assert dinov3_convnext_tiny(pretrained=False, **TINY_CONVNEXT).embed_dims == [8, 8, 8, 8]
    assert dinov3_vits16(pretrained=False, device="meta").cls_token.is_meta


@pytest.mark.parametrize(("entry", "option"), [(dinov3_vits16, "n_storage_token"), (dinov3_convnext_tiny, "num_heads")])
def test_unknown_options_are_an_error(entry: Any, option: str) -> None:
    with pytest.raises(TypeError, match=f"{entry.__name__}\\(\\) has no option '{option}'"):
        entry(pretrained=False, **{option: 1})
    with pytest.raises(TypeError, match="did you mean 'n_storage_tokens'"):
        dinov3_vits16(pretrained=False, n_storage_token=1)


@pytest.mark.parametrize(
    ("entry", "weights", "untied"),
    [
        (dinov3_vitl16, Weights.LVD1689M, False),
        (dinov3_vitl16, Weights.SAT493M, True),
        (dinov3_vitl16, "SAT493M", True),
        (dinov3_vit7b16, Weights.LVD1689M, True),
        (dinov3_vit7b16, Weights.SAT493M, True),
    ],
)
def test_which_models_have_a_norm_for_local_crops(entry: Any, weights: Any, untied: bool) -> None:
    model = entry(pretrained=False, weights=weights, **TINY_7B)
    assert (model.local_cls_norm is not None) is untied


# --- Weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["meta", "hf", "timm"])
@pytest.mark.parametrize(
    ("entry", "options"),
    [
        (dinov3_vits16, TINY),
        (dinov3_vits16plus, TINY),
        (dinov3_vit7b16, TINY_7B),
        (dinov3_convnext_tiny, TINY_CONVNEXT),
    ],
)
@torch.no_grad()
def test_every_layout_gives_the_same_model(tmp_path: Path, entry: Any, options: Any, format: str) -> None:
    source = random_model(entry, **options)
    if hasattr(source, "rope_embed"):  # as released files have them
        source.rope_embed.periods.copy_(source.rope_embed.periods.bfloat16().float())
    path = export_backbone(source, tmp_path / ("dir" if format == "hf" else "model.pth"), format)
    model = entry(weights=path, **options)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)


def test_released_files_come_from_their_address(
    server: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "BASE_URL", server.address)
    source = random_model(dinov3_vits16, **TINY)
    content = export_backbone(source, tmp_path / "a.pth").read_bytes()
    for name in ("_pretrain_lvd1689m-08c60483", "_pretrain_lvd1689m-12345678", "_pretrain_lvd1689m"):
        server.answers[f"/dinov3_vits16/dinov3_vits16{name}.pth"] = Answer(content)
    for options in ({}, {"hash": "12345678"}, {"hash": ""}, {"hash": None}, {"weights": "lvd1689m", "version": "v9"}):
        assert_states_equal(dinov3_vits16(**TINY, **options).state_dict(), source.state_dict())
    assert [Path(path).stem[13:] for path in server.requests] == [
        "_pretrain_lvd1689m-08c60483",
        "_pretrain_lvd1689m-12345678",
        "_pretrain_lvd1689m",
    ]
    with pytest.raises(ValueError, match="08c60483"):
        dinov3_vits16(check_hash=True, **TINY)


def test_refused_by_meta_the_message_says_how_to_go_on(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "BASE_URL", server.address)
    for path in (
        "vits16/dinov3_vits16_pretrain_lvd1689m-08c60483",
        "convnext_tiny/dinov3_convnext_tiny_pretrain_lvd1689m-21b726bb",
    ):
        server.answers[f"/dinov3_{path}.pth"] = Answer(b"", 403)
    for entry in (dinov3_vits16, dinov3_convnext_tiny):
        with pytest.raises(DownloadError, match=r"403 .*ai\.meta\.com.*huggingface.*weights="):
            entry()
    assert not any(cache.rglob("*.pth"))


def test_convnext_checks_hashes_too(tmp_path: Path) -> None:
    path = export_backbone(random_model(dinov3_convnext_tiny, **TINY_CONVNEXT), tmp_path / "model-00000000.pth")
    dinov3_convnext_tiny(weights=path, **TINY_CONVNEXT)
    with pytest.raises(ValueError, match="is not the file its name says"):
        dinov3_convnext_tiny(weights=path, check_hash=True, **TINY_CONVNEXT)


def test_satellite_weights_are_recognised_by_content(tmp_path: Path) -> None:
    for name, weights, kind in (("a", "SAT493M", Weights.SAT493M), ("b", "LVD1689M", Weights.LVD1689M)):
        path = export_backbone(random_model(dinov3_vitl16, weights=weights, **TINY), tmp_path / f"{name}.pth")
        model = dinov3_vitl16(weights=str(path), **TINY)
        assert (model.local_cls_norm is not None) is (kind is Weights.SAT493M)
        assert model.normalization == NORMALIZATIONS[kind]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dinov3_vit7b16_pretrain_sat493m-a6675841.pth", Weights.SAT493M),
        ("mine-a6675841.pth", Weights.SAT493M),
        ("dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth", Weights.LVD1689M),
        ("mine.pth", Weights.LVD1689M),
    ],
)
def test_the_normalisation_of_a_7b_file_is_told_by_its_name(tmp_path: Path, name: str, kind: Weights) -> None:
    path = export_backbone(random_model(dinov3_vit7b16, **TINY_7B), tmp_path / name)
    assert dinov3_vit7b16(weights=path, **TINY_7B).normalization == NORMALIZATIONS[kind]


def test_weights_by_their_name_on_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    name = "facebook/dinov3-vitl16-pretrain-sat493m"
    with pytest.raises(FileNotFoundError, match=f"hf download {name}"):
        dinov3_vitl16(weights=name, **TINY)
    source = random_model(dinov3_vitl16, weights="SAT493M", **TINY)
    export_backbone(source, tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / "abc", "hf")
    model = dinov3_vitl16(weights=name, **TINY)
    assert model.normalization == NORMALIZATIONS[Weights.SAT493M]
    assert model.local_cls_norm.weight.equal(source.norm.weight)
    with pytest.raises(ValueError, match="weights of dinov3_vitl16, not of dinov3_vits16"):
        dinov3_vits16(weights=name)


def test_a_hash_that_has_no_effect_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = export_backbone(random_model(dinov3_vits16, **TINY), tmp_path / "a.pth")
    with caplog.at_level(logging.WARNING, "dinov3"):
        dinov3_vits16(weights=path, hash="12345678", **TINY)
    assert "dinov3_vits16: hash ignored" in caplog.text


def test_teacher_checkpoints_of_a_training_fit_too(tmp_path: Path) -> None:
    source = random_model(dinov3_vits16, **TINY)
    state = {f"backbone.{key}": value for key, value in source.state_dict().items()} | {"dino_head.x": torch.zeros(1)}
    torch.save({"teacher": state}, tmp_path / "teacher_checkpoint.pth")
    model = dinov3_vits16(weights=tmp_path / "teacher_checkpoint.pth", **TINY)
    assert_states_equal(model.state_dict(), source.state_dict())


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_a_file_of_another_architecture_names_what_differs(tmp_path: Path) -> None:
    path = export_backbone(tiny_vit("swiglu"), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"dinov3_vits16, weights=.*a\.pth.*missing: blocks\.0\.mlp\.fc1") as error:
        dinov3_vits16(weights=path)
    assert "of another shape" in str(error.value)
    with pytest.raises(ValueError, match="dinov3_convnext_tiny, weights="):
        dinov3_convnext_tiny(weights=path)


def test_wrong_weights_are_explained() -> None:
    with pytest.raises(ValueError, match="dinov3_vits16 has no weights SAT493M; released are: LVD1689M"):
        dinov3_vits16(weights=Weights.SAT493M)
    with pytest.raises(ValueError, match="dinov3_vits16 has no weights SAT493M"):
        dinov3_vits16(pretrained=False, weights="SAT493M")
    with pytest.raises(ValueError, match="unknown weights 'LVD9999': expected one of LVD1689M, SAT493M, a path"):
        dinov3_vitl16(weights="LVD9999")
    with pytest.raises(TypeError, match="got 3 for weights, expected one of LVD1689M"):
        dinov3_vits16(weights=3)


# --- Transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "mean"), [("LVD1689M", 0.485), ("SAT493M", 0.430)])
def test_each_model_gives_the_transform_of_its_weights(weights: str, mean: float) -> None:
    model = dinov3_vitl16(pretrained=False, weights=weights, **TINY)
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    out = model.make_transform(resize_size=32)(image)
    assert out.shape == (3, 32, 32)
    assert out.dtype == torch.float32
    std = {0.485: 0.229, 0.430: 0.213}[mean]
    torch.testing.assert_close(out[0], torch.full((32, 32), -mean / std))
    assert model.make_transform()(image).shape == (3, 256, 256)


def test_transform_by_the_name_of_weights() -> None:
    transform = backbones.make_transform(16, weights="SAT493M")
    torch.testing.assert_close(
        transform(torch.full((3, 20, 20), 255, dtype=torch.uint8))[2, 0, 0].item(), 0.704 / 0.143
    )


# --- torch.hub -------------------------------------------------------------------------------------------------------


def test_torch_hub_loads_a_local_file(tmp_path: Path) -> None:
    source = random_model(dinov3_vits16, **TINY)
    path = export_backbone(source, tmp_path / "a.pth")
    model = torch.hub.load(str(ROOT), "dinov3_vits16", source="local", weights=str(path), **TINY)
    assert_states_equal(model.state_dict(), source.state_dict())
    assert not model.training


def test_weights_of_every_kind_load_with_torch_alone(tmp_path: Path) -> None:
    """No NumPy, no safetensors, no torchvision: everything that isn't torch's own is blocked from import."""
    vit, convnext = random_model(dinov3_vits16, **TINY), random_model(dinov3_convnext_tiny, **TINY_CONVNEXT)
    for name, model in (("vit", vit), ("convnext", convnext)):
        for format in ("meta", "hf", "timm"):
            export_backbone(model, tmp_path / name / (format if format == "hf" else f"{format}.safetensors"), format)
        export_backbone(model, tmp_path / name / "meta.pth")
    code = f"""
import sys
torchs_own = {{"torch", "torchgen", "functorch", "typing_extensions", "sympy", "mpmath", "networkx", "filelock"}}
torchs_own |= {{"jinja2", "markupsafe", "fsspec", "triton", "nvidia", "cuda", "setuptools", "dinov3", "hubconf"}}
class Block:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in torchs_own and top not in sys.stdlib_module_names and not top.startswith("_"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch, hubconf
from pathlib import Path
options = {{"vit": {TINY}, "convnext": {TINY_CONVNEXT}}}
for name, entry in (("vit", hubconf.dinov3_vits16), ("convnext", hubconf.dinov3_convnext_tiny)):
    for path in sorted(Path({str(tmp_path)!r}, name).iterdir()):
        model = entry(weights=path, **options[name])
        with torch.inference_mode():
            out = model(torch.zeros(1, 3, 64, 64))
        assert out.isfinite().all()
        print(name, path.name)
assert "torch._dynamo" not in sys.modules, "imported the compiler, which takes seconds"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    names = ["hf", "meta.pth", "meta.safetensors", "timm.safetensors"]
    assert done.stdout.split("\n")[:-1] == [f"{model} {name}" for model in ("vit", "convnext") for name in names]


def test_building_a_pretrained_model_does_not_initialise_it_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = export_backbone(random_model(dinov3_vits16, **TINY), tmp_path / "a.pth")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("random numbers drawn for weights that come from a file")

    for function in ("uniform_", "normal_"):
        monkeypatch.setattr(torch.Tensor, function, refuse)
    with caplog.at_level(logging.WARNING, "dinov3"):
        dinov3_vits16(weights=path, **TINY)
    assert not caplog.records
