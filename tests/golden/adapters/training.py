"""Golden cases of training: losses, schedules, parameter groups, whole steps, configuration, run time.

Every case has a kind; the functions for the kinds are in the `training_*` files beside this one. Each is called with
the case's name, its `params` and an empty folder. It returns the tensors that are listed in `outputs` by their names
and, as `expected`, data to compare with the entry of that name.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.golden.adapters import training_layout, training_losses, training_plain, training_steps
from tests.golden.cases import Case, Expected

KINDS = training_losses.KINDS | training_plain.KINDS | training_steps.KINDS | training_layout.KINDS

# Of computed numbers in plain data: float64 arithmetic in another order. Everything else is equal.
RTOL_OF_DATA = {"groups": 1e-12, "trajectory": 1e-9, "metric_logger": 1e-12, "scaling": 1e-12}


def cases(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> list[Case]:
    """All cases of the manifest."""
    return [_case(entry, tensors) for entry in manifest["cases"]]


def _case(entry: Mapping[str, Any], tensors: dict[str, Tensor]) -> Case:
    name, kind = entry["case"], entry["kind"]
    rules = {output: rule["rtol"] for output, rule in entry.get("outputs", {}).items()}
    expected = {output: Expected(tensors[f"{name}/{output}"], rtol_of_max=rtol) for output, rtol in rules.items()}
    return Case(
        "training",
        name,
        partial(_run, kind, name, entry["params"]),
        expected | _expected_data(kind, entry.get("expected")),
        stored_keys=frozenset(f"{name}/{output}" for output in rules),
    )


def _run(kind: str, name: str, params: Mapping[str, Any], tmp_path: Path) -> Mapping[str, Any]:
    return KINDS[kind](name, params, tmp_path)


def _expected_data(kind: str, data: Any) -> dict[str, Expected]:
    if data is None:
        return {}
    if kind == "layout":  # more files and keys than are listed may be there
        data = training_layout.expected_layout(data)
        return {part: Expected(value, subset=True) for part, value in data.items()}
    return {"expected": Expected(data, rtol=RTOL_OF_DATA.get(kind, 0.0))}
