"""Every golden case, each compared with what is stored for it."""

from pathlib import Path

import pytest

from tests.golden.adapters import AREAS, all_cases
from tests.golden.cases import Case, load_area
from tests.golden.compare import differences

CASES = all_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.area}-{case.name}")
def test_case(case: Case, tmp_path: Path) -> None:
    if case.skip:
        pytest.skip(case.skip)
    problems = differences(case.expected, case.run(tmp_path))
    if problems and case.advisory:
        pytest.xfail(f"advisory case differs: {'; '.join(problems)[:2000]}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("area", AREAS)
def test_every_stored_tensor_is_compared(area: str) -> None:
    manifest, tensors = load_area(area)
    if not manifest:
        pytest.skip(f"no {area}.json in this golden folder")
    mine = [case for case in CASES if case.area == area]
    if mine and all(case.skip for case in mine):
        pytest.skip(mine[0].skip or "")
    claimed = set().union(*(case.stored_keys for case in mine))
    assert not (left := sorted(set(tensors) - claimed)), f"{len(left)} stored tensors are never compared: {left[:20]}"


@pytest.mark.parametrize("area", AREAS)
def test_every_expected_output_is_listed_once(area: str) -> None:
    names = [case.name for case in CASES if case.area == area]
    assert len(names) == len(set(names))
