"""Golden cases of zero-shot segmentation, for the area `notebooks`."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3.eval.text.zero_shot import average_prompts, predict_slide, predict_whole, resize_short_side, upsample
from tests.golden.adapters.text_cases import dinotxt, make_case
from tests.golden.cases import Case, Expected

PREFIXES = ("short_side_resize", "zero_shot_segmentation")
_MISMATCH = "_max_mismatch"


def cases(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> list[Case]:
    """The cases of the manifest whose names begin with `PREFIXES`."""
    return [_case(name, entry, tensors) for name, entry in manifest["cases"].items() if name.startswith(PREFIXES)]


def _case(name: str, entry: Mapping[str, Any], tensors: dict[str, Tensor]) -> Case:
    values = entry.get("values", {})
    allowed = {key.removesuffix(_MISMATCH): value for key, value in values.items() if key.endswith(_MISMATCH)}
    ignored = tuple(f"{key}{_MISMATCH}" for key in allowed)
    if name.startswith("short_side_resize"):
        rows = [row["out"] for row in values["rows"]]
        return replace(make_case("notebooks", name, entry, tensors, short_sides, ignored_values=("rows",)),
                       expected={"rows": Expected(rows)})  # fmt: skip
    case = make_case("notebooks", name, entry, tensors, zero_shot_segmentation, ignored_values=ignored)
    expected = dict(case.expected)
    for key, part in allowed.items():  # class maps may differ in a few pixels, where two classes are equally near
        stored = expected.pop(key).value
        expected[key] = Expected(0.0, atol=part, transform=partial(_part_that_differs, stored))
    return replace(case, expected=expected)


def short_sides(entry: Mapping[str, Any], _: Mapping[str, Tensor], __: Path) -> dict[str, Any]:
    rows = entry["values"]["rows"]
    return {"rows": [list(resize_short_side((row["height"], row["width"]), row["size"])) for row in rows]}


def zero_shot_segmentation(entry: Mapping[str, Any], inputs: Mapping[str, Tensor], _: Path) -> dict[str, Any]:
    model = dinotxt(entry)
    tokens, image = inputs["tokens"], inputs["image"]
    with torch.no_grad():
        features = model.encode_text(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
    classes = average_prompts(features, model)
    whole = predict_whole(model, image, classes)
    slide = predict_slide(model, image, classes, entry["side"], entry["stride"])
    size = tuple(entry["target_size"])
    return {
        "text_features": classes,
        "whole": whole,
        "slide": slide,
        "whole.prediction": upsample(whole, size).argmax(0),
        "slide.prediction": upsample(slide, size).argmax(0),
    }


def _part_that_differs(stored: Tensor, got: Tensor) -> float:
    assert got.shape == stored.shape
    return (got != stored).double().mean().item()
