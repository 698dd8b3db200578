"""Golden state dicts in the Hugging Face layout: checked by shape, sum, sum of magnitudes and first values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from tests.golden.cases import Case, Expected

# Sums are stored with five decimals, values with six; float32 sums in another order differ by some 1e-7 of the terms.
ATOL, RTOL = 1e-5, 1e-6
N_FIRST = 4


def case(name: str, layout: dict[str, Any], build: Callable[[], nn.Module]) -> Case:
    """The case that writes the module of the model case `name` in the other layout."""
    expected = {
        "tensors": Expected(layout["tensors"], atol=ATOL, rtol=RTOL),
        "config": Expected(layout["config"], rtol=1e-12),
    }

    def run(_: Path) -> dict[str, Any]:
        from dinov3.checkpointer.layouts import to_hf
        from dinov3.hub.hf import hf_config

        module = build()
        tensors = {}
        for key, value in to_hf(module.state_dict()).items():
            wide = value.double()
            tensors[key] = [list(value.shape), wide.sum(), wide.abs().sum(), wide.flatten()[:N_FIRST]]
        config = hf_config(module)
        return {"tensors": tensors, "config": {key: config[key] for key in layout["config"]}}

    return Case("models", f"layout/{name}", run, expected)
