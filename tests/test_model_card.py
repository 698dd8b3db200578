"""MODEL_CARD.md states what the code says: sizes, costs, hashes, statistics."""

import re
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinov3.hub.loading import load_backbone
from dinov3.hub.registry import BACKBONES, NORMALIZATIONS, Weights
from dinov3.utils import count_parameters
from tests.helpers.source import ROOT

CARD = (ROOT / "MODEL_CARD.md").read_text(encoding="utf-8")
CLASSIFIER = 1000  # classes of the ConvNeXt whose parameters were published


def rows(before: str) -> list[list[str]]:
    """Cells of the table whose header begins with `before`."""
    lines = CARD[CARD.index(before) :].split("\n\n")[0].splitlines()
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines[2:] if line.startswith("|")]


SIZES = {name: cells for name, *cells in rows("| model | parameters")}


def on_meta(name: str, **options: Any) -> torch.nn.Module:
    return load_backbone(name, pretrained=False, device="meta", **options).eval()


@pytest.mark.parametrize("name", BACKBONES)
def test_sizes_and_costs(name: str) -> None:
    parameters, published, *costs = SIZES[name]
    model = on_meta(name)
    count = count_parameters(model)
    assert int(parameters.replace(",", "")) == count
    for side, cost in zip((256, 512), costs, strict=True):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(torch.zeros(1, 3, side, side, device="meta"))
        assert float(cost.replace(",", "")) == pytest.approx(counter.get_total_flops() / 1e9, abs=0.051)
    if published != "–":
        _assert_explained(name, count, int(re.sub(r"\D", "", published)), model.embed_dim)


def _assert_explained(name: str, count: int, published: int, width: int) -> None:
    """The count rounds to the published millions, or differs in the way that the card explains."""
    if name.startswith("dinov3_convnext"):
        count += width * CLASSIFIER + CLASSIFIER
        assert f"{count:,}" in CARD
    if name == "dinov3_vits16":
        assert count // 10**6 == published
    elif name in ("dinov3_vitl16", "dinov3_vith16plus"):
        assert round(count / 10**7) * 10 == published
        assert f"{round(count / 10**6)}" in CARD[CARD.index("Where the published number") :]
    else:
        assert round(count / 10**6) == published


def test_satellite_weights_are_as_much_larger_as_the_card_says() -> None:
    sat = count_parameters(on_meta("dinov3_vitl16", weights="SAT493M"))
    assert sat - count_parameters(on_meta("dinov3_vitl16")) == 2048
    assert "2,048 more" in CARD


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_script_counts_as_the_card_says() -> None:
    from benchmarks.model_card import gflops, parameters

    for name in ("dinov3_vits16", "dinov3_convnext_tiny"):
        assert f"{parameters(name):,}" == SIZES[name][0]
        assert f"{gflops(name, 256):,.1f}" == SIZES[name][2]


def test_hashes_and_names_are_those_of_the_table() -> None:
    files = {name: cells for name, *cells in rows("| model | `lvd1689m`")}
    assert list(files) == list(BACKBONES)
    for name, entry in BACKBONES.items():
        lvd, sat, repositories = files[name]
        assert (lvd, sat or None) == (entry.hashes[Weights.LVD1689M], entry.hashes.get(Weights.SAT493M))
        assert {f"facebook/dinov3-{short}" for short in re.findall(r"[\w-]+", repositories)} == set(
            entry.hugging_face_names()
        )


def test_statistics_are_those_of_the_table() -> None:
    for weights, _, mean, std, _ in rows("| weights | data"):
        normalization = NORMALIZATIONS[Weights[weights]]
        assert tuple(map(float, mean.split(","))) == normalization.mean
        assert tuple(map(float, std.split(","))) == normalization.std
