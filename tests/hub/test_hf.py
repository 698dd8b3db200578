"""Building models from Hugging Face folders, and writing such folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3.hub.hf import build_model_from_config, export_hf_model, hf_config, load_hf_model
from dinov3.hub.registry import Normalization
from dinov3.hub.transforms import make_transform
from tests.helpers.backbones import VITS, assert_states_equal, tiny_convnext, tiny_vit


@pytest.mark.parametrize("make", [tiny_convnext, *(lambda kind=kind: tiny_vit(kind) for kind in VITS)])
def test_a_folder_gives_the_model_that_wrote_it(tmp_path: Path, make: Any) -> None:
    model = make()
    loaded = load_hf_model(export_hf_model(model, tmp_path / "hf"))
    assert not loaded.training
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert hf_config(loaded) == hf_config(model)


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
@torch.no_grad()
def test_a_folder_that_transformers_wrote(tmp_path: Path, kind: str) -> None:
    import transformers

    config = transformers.DINOv3ViTConfig(
        hidden_size=64,
        intermediate_size=104,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_register_tokens=3,
        use_gated_mlp=kind == "swiglu",
        hidden_act="silu" if kind == "swiglu" else "gelu",
        rope_theta=50.0,
    )
    theirs = transformers.DINOv3ViTModel(config).eval()
    theirs.save_pretrained(tmp_path)
    model, x = load_hf_model(tmp_path, round_periods=False), torch.randn(2, 3, 48, 32)
    torch.testing.assert_close(model(x), theirs(x).pooler_output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("hidden", [8, 104, 488, 632, 1536, 4352, 8192])  # 448 * (488 / 448) is less than 488
@pytest.mark.parametrize("dim", [64, 384, 448, 1152])
@pytest.mark.parametrize("gated", [False, True])
def test_the_hidden_width_is_that_of_the_configuration(dim: int, hidden: int, gated: bool) -> None:
    config = {
        "model_type": "dinov3_vit",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_attention_heads": dim // 64,
        "num_hidden_layers": 1,
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
    }
    with torch.device("meta"):
        state = build_model_from_config(config).state_dict()
    assert state[f"blocks.0.mlp.{'w1' if gated else 'fc1'}.weight"].shape == (hidden, dim)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model_type": "dinov2"}, "expected 'dinov3_vit' or 'dinov3_convnext'"),
        ({"layer_norm_eps": 1e-3}, "layer_norm_eps is 0.001"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', expected 'gelu'"),
        ({"use_gated_mlp": True, "hidden_act": "silu", "intermediate_size": 100}, "multiple of 8"),
        ({"value_bias": False}, "query_bias and value_bias differ"),
    ],
)
def test_configurations_of_other_models_are_refused(change: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        build_model_from_config(hf_config(tiny_vit()) | change)


def test_a_folder_without_a_configuration_of_dinov3_is_refused(tmp_path: Path) -> None:
    folder = export_hf_model(tiny_vit(), tmp_path / "hf")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"no config\.json of a DINOv3 model"):
        load_hf_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_hf_model(folder)


def test_a_file_of_such_a_folder_does_as_well(tmp_path: Path) -> None:
    model = tiny_vit()
    folder = export_hf_model(model, tmp_path / "hf")
    loaded = load_hf_model(folder / "model.safetensors")
    assert_states_equal({"norm": loaded.norm.weight}, {"norm": model.norm.weight})


def test_the_published_snippets_run_on_a_folder(tmp_path: Path) -> None:
    """Those of the model cards, unchanged but for the folder: `pipeline`, and processor with model."""
    import numpy as np
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel, pipeline

    model = tiny_vit("mlp").eval()
    model.normalization = Normalization((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))  # type: ignore[assignment]
    folder = str(export_hf_model(model, tmp_path / "hf"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))

    feature_extractor = pipeline(model=folder, task="image-feature-extraction")
    features = feature_extractor(image)
    processor = AutoImageProcessor.from_pretrained(folder)
    theirs = AutoModel.from_pretrained(folder)
    inputs = processor(images=image, return_tensors="pt")
    with torch.inference_mode():
        pooled = theirs(**inputs).pooler_output
        ours = load_hf_model(folder, round_periods=False)

        torch.testing.assert_close(ours(inputs["pixel_values"]), pooled, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(features)[:, 0], pooled, atol=1e-5, rtol=0)
        transform = make_transform(224, normalization=ours.normalization)  # type: ignore[arg-type]
        torch.testing.assert_close(transform(image)[None], inputs["pixel_values"], atol=0.03, rtol=0)  # one grey level
    assert ours.normalization == model.normalization


def test_a_preprocessor_without_statistics_is_refused(tmp_path: Path) -> None:
    export_hf_model(tiny_vit("mlp"), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no image_mean"):
        load_hf_model(tmp_path)
