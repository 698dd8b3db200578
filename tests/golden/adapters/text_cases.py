"""What the areas `text` and `notebooks` share: inputs, the models of a case, and how outputs are stored."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.eval.text.dinotxt_model import DINOTxt, DINOTxtConfig
from dinov3.eval.text.text_tower import build_text_backbone
from dinov3.models.vision_transformer import DinoVisionTransformer
from tests.golden import fill
from tests.golden.cases import Case, Expected

Runner = Callable[[Mapping[str, Any], Mapping[str, Tensor], Path], Mapping[str, Any]]

N_HEAD, N_PROBES = 64, 4


def make_case(
    area: str,
    name: str,
    entry: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    run: Runner,
    *,
    ignored_values: tuple[str, ...] = (),
    skip: str | None = None,
) -> Case:
    """A case of the form that the manifest's `how_to_read` describes.

    Args:
        area, name, entry, tensors: as in the manifest.
        run: from the entry, its inputs by name and an empty folder to results by name: outputs, and plain values.
        ignored_values: values that are tolerances or inputs, not results.
        skip: reason not to run it.
    """
    expected = {key: Expected(value) for key, value in entry.get("values", {}).items() if key not in ignored_values}
    for key, output in entry["outputs"].items():
        expected |= dict(_expected(name, key, output, tensors))
    return Case(
        area,
        name,
        partial(_run, entry, _inputs(name, entry, tensors), run),
        expected,
        skip=skip,
        stored_keys=frozenset(key for key in tensors if key.startswith(f"{name}/")),
    )


def _run(entry: Mapping[str, Any], inputs: Mapping[str, Tensor], run: Runner, folder: Path) -> Mapping[str, Any]:
    results = dict(run(entry, inputs, folder))
    # A summary is compared part by part, each under a name of its own.
    return results | {
        f"{key}{part}": results[key] for key in entry["outputs"] for part in ("#head", "#stats", "#probe")
    }


def _expected(name: str, key: str, output: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    atol, rtol = output["atol"], output["rtol"]
    if output["stored"] == "full":
        mismatch = output.get("max_mismatch")
        assert mismatch is None
        yield key, Expected(tensors[f"{name}/{key}"], atol, rtol)
        return
    for part, summary in _SUMMARIES.items():
        stored = tensors[f"{name}/{key}{part}"]
        yield f"{key}{part}", Expected(stored, atol * (5 if part == "#probe" else 1), rtol, transform=summary)


def _head(tensor: Tensor) -> Tensor:
    return tensor.detach().float().flatten()[:N_HEAD]


def _stats(tensor: Tensor) -> Tensor:
    values = tensor.detach().double().flatten()
    return torch.stack([values.mean(), values.std(), values.abs().max(), values.square().mean().sqrt()])


def _probe(tensor: Tensor) -> Tensor:
    values = tensor.detach().double().flatten()
    probes = [fill.tensor(f"probe{i}", (len(values),)).double() for i in range(N_PROBES)]
    return torch.stack([values @ probe for probe in probes]) / len(values) ** 0.5


_SUMMARIES = {"#head": _head, "#stats": _stats, "#probe": _probe}


def _inputs(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: tensors[source["stored"]]
        if "stored" in source
        else fill.tensor(source["fill"], tuple(source["shape"]), source["scale"], source["offset"])
        for key, source in entry["inputs"].items()
    }


def vision_backbone(entry: Mapping[str, Any]) -> nn.Module:
    """The backbone of a case, initialised."""
    backbone = DinoVisionTransformer(**entry)
    backbone.init_weights()
    return backbone


def text_backbone(entry: Mapping[str, Any]) -> nn.Module:
    """The text transformer of a case, initialised."""
    backbone = build_text_backbone(entry)
    backbone.init_weights()
    return backbone


def dinotxt(entry: Mapping[str, Any]) -> DINOTxt:
    """The model of a case with its weights filled, in training mode if the case says so."""
    model = DINOTxt(
        DINOTxtConfig(**entry["config"]),
        vision_backbone(entry["vision_backbone"]),
        text_backbone(entry["text_backbone"]),
    )
    fill.fill(model)
    return model.train(bool(entry.get("train")))
