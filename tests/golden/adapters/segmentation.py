"""Golden cases of the area `segmentation`: which function runs a case is decided by the class or function it names.

Outputs are stored whole, or as a summary: the first values, statistics and four random projections.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.golden import fill
from tests.golden.adapters.segmentation_kinds import KINDS
from tests.golden.cases import Case, Expected

N_HEAD = 64
N_PROBES = 4


def cases(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> list[Case]:
    """All cases of the manifest."""
    return [_case(name, entry, tensors) for name, entry in manifest["cases"].items()]


def _case(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Case:
    expected: dict[str, Expected] = {}
    for output, rule in entry["outputs"].items():
        atol, rtol = rule["atol"], rule["rtol"]
        expected[f"{output}.shape"] = Expected(rule["shape"])
        if rule["stored"] == "full":
            expected[output] = Expected(tensors[f"{name}/{output}"], atol, rtol)
            continue
        for part, more in (("head", 1), ("stats", 1), ("probe", 5)):  # projections add up errors: 4 atol more
            expected[f"{output}#{part}"] = Expected(tensors[f"{name}/{output}#{part}"], more * atol, rtol)
    values = entry.get("values", {})
    for key, value in values.items():
        if key in _COMPARED_VALUES:
            bounds = values.get(f"{key}_atol", 0.0), values.get(f"{key}_rtol", 0.0)
            expected[f"values.{key}"] = Expected(value, *bounds)
    stored = frozenset(key for key in tensors if key.startswith(f"{name}/"))
    inputs = {f"{name}/input/{key}" for key in entry["inputs"]}
    claimed = inputs | {f"{name}/{output}" for output in expected}
    return Case("segmentation", name, partial(_run, entry, tensors), expected, stored_keys=stored & claimed)


# Entries of "values" that are results; the others describe inputs, or how closely results must agree.
_COMPARED_VALUES = frozenset(
    {
        "state_dict_keys",
        "head_keys",
        "n_state_dict_keys",
        "n_head_keys",
        "n_aux_outputs",
        "table",
        "metrics",
        "n_images",
        "label_dtype",
        "trainable",
    }
)


def _run(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], _: Path) -> dict[str, Any]:
    inputs = {name: _input(described, tensors) for name, described in entry["inputs"].items()}
    kind = KINDS[entry["target"].rsplit(".", 1)[-1]]
    got = kind(_numbers(entry), inputs)
    results = {key: value for key, value in got.items() if key.startswith("values.")}
    for name, rule in entry["outputs"].items():
        value = torch.as_tensor(got[name]).detach()
        results[f"{name}.shape"] = list(value.shape)
        if rule["stored"] == "full":
            results[name] = value
        else:
            results |= {f"{name}#{part}": summary for part, summary in _summary(value).items()}
    return results


def _input(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    if "stored" in described:
        return tensors[described["stored"]]
    return fill.tensor(described["fill"], tuple(described["shape"]), described["scale"], described["offset"])


def _numbers(value: Any) -> Any:
    """JSON data with the infinities that it writes as text."""
    if isinstance(value, Mapping):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return math.inf if value == "inf" else value


def _summary(value: Tensor) -> dict[str, Tensor]:
    flat = value.float().flatten()
    probes = [fill.tensor(f"probe{i}", (len(flat),)).double() @ flat.double() for i in range(N_PROBES)]
    wide = flat.double()
    return {
        "head": flat[:N_HEAD],
        "stats": torch.stack([wide.mean(), wide.std(), wide.abs().max(), wide.square().mean().sqrt()]),
        "probe": torch.stack(probes) / len(flat) ** 0.5,
    }
