"""The hub's detector on a tiny backbone: what its examples are run with."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from dinov3.eval.detection.config import DetectionHeadConfig
from dinov3.eval.detection.models.processor import head_state
from dinov3.hub import detectors
from dinov3.hub.registry import BACKBONES, BackboneEntry, Weights
from dinov3.models.vision_transformer import DinoVisionTransformer

_VIT = {"embed_dim": 32, "depth": 4, "num_heads": 2, "ffn_ratio": 1, "patch_size": 16}


class HubFiles(NamedTuple):
    """Weight files as released ones are, but tiny."""

    head: Path
    backbone: Path


def small_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> HubFiles:
    """Let `dinov3_vit7b16_de` stand on a tiny backbone, with a head as narrow, and write the files of both."""
    name = "dinov3_vit7b16"
    entry = BackboneEntry(name, {Weights.LVD1689M: "00000000"}, DinoVisionTransformer, _VIT)
    monkeypatch.setitem(BACKBONES, name, entry)  # type: ignore[arg-type]

    def narrow(_: str) -> DetectionHeadConfig:
        return DetectionHeadConfig(
            hidden_dim=32,
            nheads=4,
            dim_feedforward=32,
            dec_layers=1,
            num_encoder_layers=1,
            decoder_rpe_hidden_dim=8,
            num_queries_one2one=20,
            num_queries_one2many=10,
            topk=30,
            n_windows_sqrt=3,
        )

    monkeypatch.setattr(detectors, "_head_config", narrow)
    torch.manual_seed(0)
    model = detectors.dinov3_vit7b16_de(pretrained=False)
    files = HubFiles(folder / "detection_head.pth", folder / "detection_backbone.pth")
    torch.save({"model": head_state(model.detector)}, files.head)
    torch.save(model.detector.backbone.extractor.backbone.state_dict(), files.backbone)  # type: ignore[union-attr]
    return files
