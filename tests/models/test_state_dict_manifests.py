"""Names, shapes, dtypes and order of every real size, built on the meta device, against the stored manifests."""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from dinov3.checkpointer.layouts import to_hf
from dinov3.hub import backbones
from dinov3.layers.dino_head import DINOHead
from dinov3.models import vision_transformer
from dinov3.utils import count_parameters
from tests.golden.cases import golden_dir

MANIFESTS: dict[str, Any] = json.loads((golden_dir() / "models_manifests.json").read_text())
MODELS: dict[str, Any] = MANIFESTS["models"]
HUB_MODELS = [name for name in MODELS if name.startswith("dinov3_")]


def build(name: str) -> nn.Module:
    """`dinov3_vitl16@SAT493M`, `vit_small()` or `DINOHead(1024, 65536)` on the meta device."""
    with torch.device("meta"):
        if name.startswith("DINOHead"):
            return DINOHead(*map(int, re.findall(r"\d+", name)))
        if name.endswith("()"):
            return getattr(vision_transformer, name.removesuffix("()"))()
        entry, _, weights = name.partition("@")
        return getattr(backbones, entry)(pretrained=False, **({"weights": weights} if weights else {}))


def expand(layout: dict[str, Any]) -> Iterable[tuple[str, list[Any]]]:
    """Keys in order; what follows the first key of block 0 is repeated for each block."""
    repeated = {key: value for key, value in layout["keys"].items() if "{i}" in key}
    done = False
    for key, value in layout["keys"].items():
        if "{i}" not in key:
            yield key, value
        elif not done:
            done = True
            for i in range(layout["repeat"]):
                yield from ((name.replace("{i}", str(i)), described) for name, described in repeated.items())


def describe(state: dict[str, torch.Tensor]) -> list[tuple[str, list[Any]]]:
    return [(key, [list(value.shape), str(value.dtype).removeprefix("torch.")]) for key, value in state.items()]


@pytest.mark.parametrize("name", MODELS)
def test_state_dict(name: str) -> None:
    want, model = MODELS[name], build(name)
    assert describe(model.state_dict()) == list(expand(want["reference"]))
    assert len(model.state_dict()) == want["tensors"]
    assert count_parameters(model) == want["parameters"]
    if "sha256_of_keys" in want:
        keys = "\n".join(sorted(model.state_dict()))
        assert hashlib.sha256(keys.encode()).hexdigest() == want["sha256_of_keys"]
    for attribute in ("embed_dim", "n_blocks", "num_heads"):
        if attribute in want:
            assert getattr(model, attribute) == want[attribute]


@pytest.mark.parametrize("name", HUB_MODELS)
def test_hugging_face_layout(name: str) -> None:
    model = build(name)
    for key, buffer in model.named_buffers():
        if key.endswith("bias_mask"):  # the converter looks at its values, which the meta device doesn't have
            parent, leaf = key.rsplit(".", 1)
            real = torch.ones(buffer.shape)
            real[len(real) // 3 : 2 * len(real) // 3] = 0
            setattr(model.get_submodule(parent), leaf, real)
    converted = to_hf(model.state_dict())
    assert dict(describe(converted)) == dict(expand(MODELS[name]["hf"]))
    assert len(converted) == MODELS[name]["hf"]["tensors"]


@pytest.mark.parametrize("name", [name for name in MANIFESTS["init_statistics"] if name != "about"])
def test_init_statistics(name: str) -> None:
    """Mean, deviation and largest magnitude after `init_weights()`, within what one random sample can tell."""
    model = getattr(backbones, name)(pretrained=False)
    state = model.state_dict()
    for key, (mean, std, largest) in MANIFESTS["init_statistics"][name].items():
        value = state[key].double()
        slack = 6 * std / math.sqrt(value.numel())
        assert abs(value.mean().item() - mean) <= 1.5 * slack + 1e-3 * abs(mean) + 1e-9, key
        assert abs(value.std(unbiased=False).item() - std) <= slack + 1e-3 * std + 1e-9, key
        assert value.abs().max().item() <= 1.6 * largest + 1e-9, key
