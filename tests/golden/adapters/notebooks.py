"""Golden cases of the area `notebooks`: sizes, patch labels, neighbourhoods, propagation, zero-shot segmentation."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.eval.patches.foreground import is_clear
from dinov3.eval.patches.sizes import patch_means, resize_to_multiple, resize_to_patches
from dinov3.eval.patches.tracking import make_neighborhood_mask, predicted_mask, propagate, upsample_probs
from tests.golden import fill
from tests.golden.adapters import notebooks_zero_shot
from tests.golden.cases import Case, Expected

Entry = Mapping[str, Any]


def cases(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> list[Case]:
    zero_shot = notebooks_zero_shot.cases(manifest, tensors)
    names = {case.name for case in zero_shot}
    return [_case(name, entry, tensors) for name, entry in manifest["cases"].items() if name not in names] + zero_shot


def _case(name: str, entry: Entry, tensors: Mapping[str, Tensor]) -> Case:
    stored = {key for key in tensors if key.startswith(f"{name}/")}
    expected = {
        key: Expected(tensors[f"{name}/{key}"], atol=output["atol"], rtol=output["rtol"])
        for key, output in entry["outputs"].items()
    }
    inputs = {
        key: tensors[spec["stored"]]
        if "stored" in spec
        else fill.tensor(spec["fill"], tuple(spec["shape"]), spec["scale"], spec["offset"])
        for key, spec in entry["inputs"].items()
    }
    if "values" in entry:
        expected["rows"] = Expected([row["out"] for row in entry["values"]["rows"]])
    kind = next(kind for kind in RUNNERS if name.startswith(kind))
    return Case("notebooks", name, partial(_run, RUNNERS[kind], entry, inputs), expected, stored_keys=frozenset(stored))


def _run(runner: Callable[..., dict[str, Any]], entry: Entry, inputs: Mapping[str, Tensor], _: Path) -> dict[str, Any]:
    return runner(entry, inputs)


def _rows(size: Callable[..., tuple[int, int]], entry: Entry, _: Mapping[str, Tensor]) -> dict[str, Any]:
    rows = ({key: value for key, value in row.items() if key != "out"} for row in entry["values"]["rows"])
    return {"rows": [list(size(**row)) for row in rows]}


def _patch_labels(entry: Entry, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    means = patch_means(inputs["mask"], entry["patch_size"])
    return {"patch_means": means, "selected": is_clear(means)}


def _neighborhood(entry: Entry, _: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"mask": make_neighborhood_mask(**entry["kwargs"])}


def _propagate(entry: Entry, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    kwargs = entry["kwargs"]
    probs = propagate(
        F.normalize(inputs["current"], dim=-1),
        F.normalize(inputs["context"], dim=-1),
        torch.softmax(inputs["probs"], dim=-1),
        make_neighborhood_mask(kwargs["h"], kwargs["w"], kwargs["size"], kwargs["shape"]),
        kwargs["topk"],
        kwargs["temperature"],
    )
    size = tuple(kwargs["up"])
    return {
        "probs": probs,
        "postprocessed": upsample_probs(probs, size)[None],
        "prediction": predicted_mask(probs, size),
    }


RUNNERS: dict[str, Callable[..., dict[str, Any]]] = {
    "resize_to_patches": partial(_rows, resize_to_patches),
    "resize_to_multiple": partial(_rows, resize_to_multiple),
    "patch_labels": _patch_labels,
    "neighborhood": _neighborhood,
    "propagate": _propagate,
}
