"""Golden cases of the area `data_evals`: data (`data_cases.py`) and classification evaluations (`eval_cases.py`)."""

from typing import Any

from torch import Tensor

from tests.golden.adapters.data_cases import data_case
from tests.golden.adapters.eval_cases import eval_case
from tests.golden.cases import Case


def cases(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> list[Case]:
    """One case per entry of the manifest."""
    return [
        data_case(name, spec, tensors) or eval_case(name, spec, tensors) for name, spec in manifest["cases"].items()
    ]
