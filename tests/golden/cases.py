"""What a golden case is, and where case files are read from.

Every area stores its cases in a form of its own; its adapter (see `adapters/`) turns them into `Case` objects, so that
one test (`test_golden.py`) and one comparison (`compare.py`) serve them all.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Expected:
    """One stored output and how close a result must come to it.

    Attributes:
        value: stored tensor, or plain JSON data (numbers, strings, lists, mappings).
        atol, rtol: elementwise bound |got - value| <= atol + rtol * |value|; both 0 mean equality.
        rtol_of_max: further allowance, this times the largest |value|.
        rel_rms: if set, also rms(got - value) <= rel_rms * rms(value).
        transform: applied to what the case returned before it is compared (a summary of a large tensor, say).
        subset: plain data only: every entry of `value` must be there, in order; the result may hold more.
    """

    value: Any
    atol: float = 0.0
    rtol: float = 0.0
    rtol_of_max: float = 0.0
    rel_rms: float | None = None
    transform: Callable[[Any], Any] | None = None
    subset: bool = False


@dataclass(frozen=True)
class Case:
    """A golden case, ready to run.

    Attributes:
        area: name of the manifest.
        name: unique within the area.
        run: called with an empty folder of its own; returns output name -> tensor or plain data.
        expected: output name -> stored value. Every one of them must be among the results.
        skip: reason why this case isn't run (an area that isn't built yet: the issue that brings it), or None.
        advisory: run and reported, but a difference does not fail the test.
        stored_keys: names in the `.safetensors` file that this case compares (a test checks that none is left over).
    """

    area: str
    name: str
    run: Callable[[Path], Mapping[str, Any]]
    expected: Mapping[str, Expected]
    skip: str | None = None
    advisory: bool = False
    stored_keys: frozenset[str] = field(default_factory=frozenset)


def golden_dir() -> Path:
    """The folder with the case files: `DINOV3_GOLDEN`, else the copy beside this file."""
    return Path(os.environ.get("DINOV3_GOLDEN") or Path(__file__).parent)


def load_area(area: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest of an area and its stored tensors; ({}, {}) if the folder has no such area."""
    manifest = golden_dir() / f"{area}.json"
    if not manifest.exists():
        return {}, {}
    stored = manifest.with_suffix(".safetensors")
    return json.loads(manifest.read_text()), load_file(stored) if stored.exists() else {}
