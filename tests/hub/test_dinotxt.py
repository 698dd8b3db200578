"""The hub's dino.txt: released manifest, strict loading, whose fault an error is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hubconf
from dinov3.eval.text.tokenizer import DEFAULT_VOCABULARY
from dinov3.hub import dinotxt
from dinov3.hub.dinotxt import DINOTxtWeights
from dinov3.hub.registry import Weights
from tests.golden.cases import golden_dir
from tests.helpers.backbones import assert_states_equal
from tests.helpers.tiny_dinotxt import Files, byte_vocabulary, small_hub

ENTRY = "dinov3_vitl16_dinotxt_tet1280d20h24l"


def load(files: Files, **options: Any) -> Any:
    given = {"weights": files.weights, "backbone_weights": files.backbone_weights}
    return getattr(hubconf, ENTRY)(**given | options)


def test_the_released_size_has_the_released_tensors(tmp_path: Path) -> None:
    manifest = json.loads((golden_dir() / "text_state_dicts.json").read_text())[ENTRY]
    with torch.device("meta"):
        model, _ = hubconf.dinov3_vitl16_dinotxt_tet1280d20h24l(
            pretrained=False, bpe_path_or_url=byte_vocabulary(tmp_path / "bytes.txt.gz")
        )
    got = {
        key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in model.state_dict().items()
    }
    assert got == manifest["head"] | manifest["backbone"]
    assert all(value.is_meta for value in model.state_dict().values())


def test_files_are_loaded_strictly_and_in_evaluation_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files, made = small_hub(monkeypatch, tmp_path)
    model, tokenizer = load(files)
    assert_states_equal(model.state_dict(), made.state_dict())
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.visual_model.backbone.parameters())
    texts = tokenizer.tokenize(["a cat", "dogs"])
    image = model.make_transform(resize_size=32)(torch.zeros(3, 40, 50, dtype=torch.uint8))[None]
    with torch.inference_mode():
        logits, transposed = model.get_logits(image, texts)
    assert logits.shape == (1, 2)
    assert torch.equal(logits.T, transposed)


def test_a_backbone_in_the_file_does_not_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files, made = small_hub(monkeypatch, tmp_path)
    state = {
        key: value + 1 if ".backbone." in key and "visual" in key else value for key, value in made.state_dict().items()
    }
    torch.save(state, tmp_path / "whole.pth")
    model, _ = load(files, weights=tmp_path / "whole.pth")
    assert_states_equal(model.state_dict(), made.state_dict())


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
def test_a_file_that_fits_in_part_is_named(change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files, _ = small_hub(monkeypatch, tmp_path)
    state = torch.load(files.weights, weights_only=True)
    key = "text_model.head.linear_projection.weight"
    if change == "missing":
        del state[key]
    elif change == "unexpected":
        key = "text_model.more"
        state[key] = torch.zeros(1)
    else:
        state[key] = torch.zeros(2, 2)
    torch.save(state, files.weights)
    with pytest.raises(ValueError, match=rf"dino.txt, weights=.*dinotxt.pth: .*{key}"):
        load(files)


def test_which_of_two_files_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files, _ = small_hub(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=r"weights=.*vitl16.pth.*is it a backbone\? Then pass it as backbone_weights="):
        load(files, weights=files.backbone_weights)
    with pytest.raises(ValueError, match=r"dinov3_vitl16, weights=.*dinotxt.pth"):
        load(files, backbone_weights=files.weights)


@pytest.mark.parametrize("weights", ["LVD9", Weights.LVD1689M, 3])
def test_unknown_weights_are_refused(weights: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files, _ = small_hub(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="expected one of LVTD2300M, a path or an address"):
        load(files, weights=weights)


def test_a_member_or_its_name_is_the_released_file() -> None:
    for weights in (DINOTxtWeights.LVTD2300M, "LVTD2300M", "lvtd2300m"):
        assert str(dinotxt._source(weights)).endswith("dinotxt_vision_head_and_text_encoder-a442d8f5.pth")
    assert dinotxt._VOCABULARY == DEFAULT_VOCABULARY


def test_a_missing_vocabulary_is_noticed_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files, _ = small_hub(monkeypatch, tmp_path)
    files.backbone_weights.unlink()
    with pytest.raises(FileNotFoundError, match="open_clip_torch"):
        load(files, bpe_path_or_url=tmp_path / "none.txt.gz")


def test_check_hash_reaches_both_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files, _ = small_hub(monkeypatch, tmp_path)
    for name in ("weights", "backbone_weights"):
        wrong = tmp_path / f"{name}-00000000.pth"
        getattr(files, name).rename(wrong)
        with pytest.raises(ValueError, match=rf"{name}-00000000.pth is not the file|has no hash in its name"):
            load(files._replace(**{name: wrong}), check_hash=True)
        wrong.rename(getattr(files, name))


def test_random_weights_come_in_training_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small_hub(monkeypatch, tmp_path)
    model, _ = hubconf.dinov3_vitl16_dinotxt_tet1280d20h24l(pretrained=False)
    assert model.training
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert model.logit_scale.item() == pytest.approx(2.6593, abs=1e-4)
