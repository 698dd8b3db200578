"""One adapter per area: `cases(manifest, tensors) -> list[Case]`."""

from importlib import import_module

from tests.golden.cases import Case, load_area

AREAS = ("training", "models", "data_evals", "depth", "detection", "segmentation", "text", "notebooks")


def all_cases() -> list[Case]:
    """The cases of every area in the golden folder."""
    found: list[Case] = []
    for area in AREAS:
        manifest, tensors = load_area(area)
        if manifest:
            found += import_module(f"tests.golden.adapters.{area}").cases(manifest, tensors)
    return found
