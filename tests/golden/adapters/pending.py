"""Cases of areas that are not built yet: listed, and skipped with the issue that brings them."""

from pathlib import Path
from typing import Any

from torch import Tensor

from tests.golden.cases import Case


def pending_cases(area: str, manifest: dict[str, Any], tensors: dict[str, Tensor], reason: str) -> list[Case]:
    """Every case of the manifest, skipped with `reason`."""
    cases = manifest["cases"]
    names = list(cases) if isinstance(cases, dict) else [case["name"] for case in cases]

    def not_built(_: Path) -> dict[str, Any]:
        raise NotImplementedError(reason)

    return [
        Case(
            area,
            name,
            not_built,
            {},
            skip=reason,
            stored_keys=frozenset(k for k in tensors if k.startswith(f"{name}/")),
        )
        for name in names
    ]
