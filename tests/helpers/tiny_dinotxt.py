"""dino.txt in the size of a test: a vocabulary of bytes, and the hub entry with small towers in its place."""

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dinov3.eval.text import tokenizer as tokenizer_module
from dinov3.eval.text.dinotxt_model import DINOTxt, DINOTxtConfig
from dinov3.eval.text.text_tower import build_text_backbone
from dinov3.hub import dinotxt, registry
from dinov3.models.vision_transformer import DinoVisionTransformer
from tests.golden import fill
from tests.helpers.backbones import tiny_vit

VOCAB_SIZE = 514  # bytes, bytes at the end of a word, start and end
TEXT_BACKBONE: dict[str, Any] = {
    "context_length": 77,
    "vocab_size": VOCAB_SIZE,
    "dim": 24,
    "num_heads": 3,
    "num_layers": 2,
    "ffn_ratio": 2.0,
    "is_causal": True,
}
MODEL: dict[str, Any] = {
    "embed_dim": 256,
    "vision_model_use_class_token": True,
    "vision_model_use_patch_tokens": True,
    "vision_model_num_head_blocks": 1,
    "text_model_tokens_pooler_type": "argmax",
    "text_model_use_linear_projection": True,
}
ENTRY = "dinov3_vitl16"


class Files(NamedTuple):
    """What a user of the hub has."""

    weights: Path
    backbone_weights: Path
    vocabulary: Path


def byte_vocabulary(path: Path) -> Path:
    """A vocabulary without merges: every byte is a token."""
    path.write_bytes(gzip.compress(b"#version: bytes\n", mtime=0))
    return path


def tiny_dinotxt(**config: Any) -> DINOTxt:
    """A model with definite weights, in evaluation mode."""
    model = DINOTxt(DINOTxtConfig(**MODEL | config), tiny_vit(), build_text_backbone(TEXT_BACKBONE))
    fill.fill(model)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
    return model.eval()


def small_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[Files, DINOTxt]:
    """Put small towers into the hub's dino.txt entry and its backbone; returns files, and the model in them.

    Replaced are the sizes of both towers, the network behind the name of the backbone, and the vocabulary that is found
    by default, as the released one is not part of this package; the entry itself runs as it is.
    """
    model = tiny_dinotxt()
    state = model.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    files = Files(folder / "dinotxt.pth", folder / "vitl16.pth", byte_vocabulary(folder / "bytes.txt.gz"))
    torch.save({key: value for key, value in state.items() if ".backbone." not in key or "text" in key}, files.weights)
    torch.save(model.visual_model.backbone.state_dict(), files.backbone_weights)

    def build(**_: Any) -> DinoVisionTransformer:
        return tiny_vit()

    entry = replace(registry.BACKBONES[ENTRY], build=build, options={}, untied_local_norm=())
    monkeypatch.setitem(registry.BACKBONES, ENTRY, entry)  # type: ignore[arg-type]
    monkeypatch.setattr(dinotxt, "_MODEL", MODEL)
    monkeypatch.setattr(dinotxt, "_TEXT_BACKBONE", TEXT_BACKBONE)
    monkeypatch.setattr(tokenizer_module, "_find_default", lambda: files.vocabulary)
    return files, model
