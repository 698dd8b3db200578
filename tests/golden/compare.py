"""The one comparison of golden results with stored values."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.golden.cases import Expected

# Of tensors that are stored as zero, where a relative bound says nothing.
NEGLIGIBLE = 1e-12


def differences(expected: Mapping[str, Expected], got: Mapping[str, Any]) -> list[str]:
    """One line per output that is missing or too far from its stored value; empty if all agree."""
    problems: list[str] = []
    for name, want in expected.items():
        if name not in got:
            problems.append(f"{name}: not among the results ({', '.join(map(str, got)) or 'none'})")
            continue
        value = got[name] if want.transform is None else want.transform(got[name])
        problems += [f"{name}{problem}" for problem in _compare(want.value, value, want)]
    return problems


def _compare(want: Any, got: Any, rule: Expected) -> list[str]:
    if isinstance(want, Tensor):
        return _compare_tensors(want, got, rule)
    if isinstance(got, Tensor | np.ndarray | np.generic):
        got = got.tolist()
    if isinstance(want, Mapping):
        return _compare_mappings(want, got, rule)
    if isinstance(want, Sequence) and not isinstance(want, str):
        return _compare_sequences(want, got, rule)
    if isinstance(want, bool) or isinstance(got, bool) or not isinstance(want, int | float):
        return [] if _same(want, got) else [f": got {got!r}, expected {want!r}"]
    got = torch.tensor(got, dtype=torch.float64) if isinstance(got, int | float) else got  # not rounded to float32
    return _compare_tensors(torch.tensor(want, dtype=torch.float64), got, rule)


def _same(want: Any, got: Any) -> bool:
    return bool(want == got or (isinstance(want, str) and want == str(got)))


def _compare_mappings(want: Mapping[str, Any], got: Any, rule: Expected) -> list[str]:
    if not isinstance(got, Mapping):
        return [f": got {type(got).__name__}, expected a mapping"]
    got = {str(key): value for key, value in got.items()}
    missing = [key for key in want if key not in got]
    extra = [] if rule.subset else [key for key in got if key not in want]
    problems = [f": missing keys {missing}"] if missing else []
    problems += [f": unexpected keys {extra}"] if extra else []
    for key in want:
        if key in got:
            problems += [f".{key}{problem}" for problem in _compare(want[key], got[key], rule)]
    return problems


def _compare_sequences(want: Sequence[Any], got: Any, rule: Expected) -> list[str]:
    if not isinstance(got, Sequence | set | frozenset) or isinstance(got, str):
        return [f": got {got!r}, expected a sequence"]
    if rule.subset:
        rest = iter(got)
        missing = [item for item in want if not any(not _compare(item, other, rule) for other in rest)]
        return [f": missing, or out of order: {missing}"] if missing else []
    got = list(got)
    if len(got) != len(want):
        return [f": {len(got)} entries, expected {len(want)}: got {got!r:.400}, expected {want!r:.400}"]
    return [f"[{i}]{p}" for i, (w, g) in enumerate(zip(want, got, strict=True)) for p in _compare(w, g, rule)]


def _compare_tensors(want: Tensor, got: Any, rule: Expected) -> list[str]:
    try:
        # Plain numbers are doubles: as float32 they would miss stored values by rounding.
        plain = not isinstance(got, Tensor | np.ndarray | np.generic)
        got = torch.as_tensor(got, dtype=torch.float64 if plain else None).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        return [f": got {got!r:.200}, expected a tensor"]
    if tuple(got.shape) != tuple(want.shape):
        return [f": shape {tuple(got.shape)}, expected {tuple(want.shape)}"]
    if want.numel() == 0:
        return []
    a, b = got.double(), want.double()
    unequal = ~((a == b) | (a.isnan() & b.isnan()))
    gap = torch.where(unequal, (a - b).abs(), torch.zeros_like(a))
    finite = b[b.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    size = b.abs().nan_to_num(nan=0.0, posinf=math.inf)
    bound = rule.atol + rule.rtol * size + rule.rtol_of_max * largest
    worst = (gap - bound).nan_to_num(nan=math.inf).max().item()
    problems = []
    if worst > 0 or bool((unequal & (a.isnan() | b.isnan() | a.isinf() | b.isinf())).any()):
        at = int((gap - bound).nan_to_num(nan=math.inf).flatten().argmax())
        problems.append(
            f": worst |got - expected| = {gap.flatten()[at]:.3g} at {at} (got {a.flatten()[at]:.8g}, expected "
            f"{b.flatten()[at]:.8g}, allowed {bound.flatten()[at]:.3g}); "
            f"{int((gap > bound).sum())} of {a.numel()} differ"
        )
    if rule.rel_rms is not None:
        rms, scale = gap.square().mean().sqrt().item(), b.square().mean().sqrt().item()
        if not (rms <= rule.rel_rms * scale or rms <= NEGLIGIBLE):
            problems.append(f": rms difference {rms:.3g}, allowed {rule.rel_rms:.2g} x {scale:.3g}")
    return problems
