"""The hub's depth model on a tiny backbone: what its examples are run with."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dinov3.hub import depthers
from dinov3.hub.registry import BACKBONES, BackboneEntry, Weights
from dinov3.models.vision_transformer import DinoVisionTransformer

# The released head looks at blocks 9, 19, 29 and 39.
_VIT = {"embed_dim": 32, "depth": 40, "num_heads": 1, "ffn_ratio": 1, "patch_size": 16}


class HubFiles(NamedTuple):
    """Weight files as released ones are, but tiny."""

    head: Path
    backbone: Path


def small_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, *, narrow: bool = True) -> HubFiles:
    """Let `dinov3_vit7b16_dd` stand on a tiny backbone, and write the files of backbone and head.

    With `narrow` the head is as narrow as the backbone, otherwise as wide as the released one: 198 M parameters.
    """
    name = "dinov3_vit7b16"
    entry = BackboneEntry(name, {Weights.LVD1689M: "00000000"}, DinoVisionTransformer, _VIT)
    monkeypatch.setitem(BACKBONES, name, entry)  # type: ignore[arg-type]
    released = depthers._get_depther_config

    def narrow_config(*args: Any, **kwargs: Any) -> Any:
        config = released(*args, **kwargs)
        config.n_output_channels = 16
        config.head_kwargs = {"channels": 8, "post_process_channels": [8, 8, 8, 8], "n_hidden_channels": 8}
        return config

    if narrow:
        monkeypatch.setattr(depthers, "_get_depther_config", narrow_config)
    torch.manual_seed(0)
    depther = depthers.dinov3_vit7b16_dd(pretrained=False)
    files = HubFiles(folder / "depth_head.pth", folder / "depth_backbone.pth")
    torch.save(depther.decoder.state_dict(), files.head)
    torch.save(depther.encoder.backbone.state_dict(), files.backbone)  # type: ignore[union-attr]
    return files
