"""The hub's segmentation model on a tiny backbone: what its examples are run with."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from dinov3.eval.segmentation.models import head_state
from dinov3.hub import segmentors
from tests.eval.segmentation.toys import register_tiny_backbone


class HubFiles(NamedTuple):
    """Weight files as released ones are, but tiny."""

    head: Path
    backbone: Path


def small_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, *, narrow: bool = True) -> HubFiles:
    """Let `dinov3_vit7b16_ms` stand on a tiny backbone, and write the files of backbone and head.

    With `narrow` the head is as narrow as the backbone, otherwise as wide as the released one: 668 M parameters.
    """
    backbone = register_tiny_backbone(monkeypatch, folder)
    if narrow:
        make = partial(segmentors._make_dinov3_m2f_segmentor, hidden_dim=32)
        monkeypatch.setattr(segmentors, "_make_dinov3_m2f_segmentor", make)
    torch.manual_seed(0)
    head = folder / "m2f_head.pth"
    torch.save(head_state(segmentors.dinov3_vit7b16_ms(pretrained=False)), head)
    return HubFiles(head, backbone)
