"""Seconds per fit of the logistic regression beside scikit-learn's lbfgs.

Both solve the problem of `dinov3.eval.logistic` to the same objective, at most one part in a million above the optimum:
scikit-learn gets, for each C, the loosest tolerance of 1e-4, 1e-5, ... that leads there, and as many iterations as it
needs; only that fit is timed. Ours gets 1e-9, divided by C^0.3 beyond 1: the same gradient is further from the optimum
where the penalty is weak. The sweep runs over the evaluation's 45 values of C, ours with warm starts, as the evaluation
does it; scikit-learn, which is not given any, is timed for every 11th value, and the sum is scaled up.

The features are Gaussian clusters in a space whose directions differ in spread, as those of images do, and a tenth of
the labels is wrong, so that the classes can't be told apart without error.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.frame.bench import Bench
from dinov3.eval.log_regression import C_POWER_RANGE
from dinov3.eval.logistic import LogisticModel, LogisticRegression, SklearnLogisticRegression

TABLE = "logistic regression"
_GAP = 1e-6  # relative, above the optimum
_TOLERANCE = 1e-9
_MAX_ITERATIONS, _MAX_ITERATIONS_SKLEARN = 1000, 20_000


class Fit(NamedTuple):
    """One fit."""

    seconds: float
    tolerance: float
    model: LogisticModel
    unfinished: bool

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s{' (unfinished)' if self.unfinished else ''}"


def make_data(samples: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Features, float32 `[n, D]`, and labels."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(classes, (samples,), generator=generator)
    spread = torch.arange(1, width + 1.0).rsqrt()
    features = (0.7 * normal(classes, width)[labels] + normal(samples, width)) * spread
    features = features @ torch.linalg.qr(normal(width, width))[0] * 3 + 0.5
    wrong = torch.rand(samples, generator=generator) < 0.1
    return features, torch.where(wrong, torch.randint(classes, (samples,), generator=generator), labels)


def objective(model: LogisticModel, features: Tensor, labels: Tensor, C: float) -> float:
    """What is minimised, in float64."""
    loss = torch.zeros((), dtype=torch.float64)
    for x, y in zip(features.split(2048), labels.split(2048), strict=True):
        loss += cross_entropy(x.double() @ model.weight.T + model.bias, y, reduction="sum")
    return ((loss + model.weight.square().sum() / (2 * C)) / len(labels)).item()


def timed(fit: Callable[[float], LogisticModel], tolerance: float) -> Fit:
    with Warnings() as warnings:
        start = time.perf_counter()
        model = fit(tolerance)
        seconds = time.perf_counter() - start
    return Fit(seconds, tolerance, model, unfinished=bool(warnings.seen))


def fit_to_level(
    fit: Callable[[float], LogisticModel], measure: Callable[[LogisticModel], float], level: float, loosest: int
) -> Fit:
    """The fit with the loosest tolerance, from `10 ** -loosest` on, whose objective is at most `level`.

    If its iterations are not enough, their time is the answer: less than what was needed.
    """
    for exponent in range(loosest, 13):
        found = timed(fit, 10.0**-exponent)
        if found.unfinished or measure(found.model) <= level:
            break
    return found


class Warnings(logging.Handler):
    """Whether the package's logger warned while a block ran."""

    def __enter__(self) -> "Warnings":
        self.seen = 0
        logging.getLogger("dinov3").addHandler(self)
        return self

    def emit(self, record: logging.LogRecord) -> None:
        self.seen += record.levelno >= logging.WARNING

    def __exit__(self, *_: object) -> None:
        logging.getLogger("dinov3").removeHandler(self)


class Problem:
    """The two solvers on one set of features; the setup of ours is part of its first fit."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels
        start = time.perf_counter()
        self._ours = LogisticRegression(features, labels)
        self.setup_s = time.perf_counter() - start
        self._sklearn = SklearnLogisticRegression(features.cpu(), labels.cpu())

    def ours(self, C: float, tolerance: float = _TOLERANCE, start: LogisticModel | None = None) -> Fit:
        """One fit of ours."""
        fit = partial(self._ours.fit, C, max_iterations=_MAX_ITERATIONS, start=start)
        return timed(lambda tolerance: fit(tolerance=tolerance), tolerance / max(1.0, C) ** 0.3)

    def best(self, C: float, start: LogisticModel) -> float:
        """The objective at the optimum."""
        return self.objective(self.ours(C, 1e-12, start).model, C)

    def theirs(self, C: float, level: float, loosest: int) -> Fit:
        """The fit of scikit-learn that comes down to that objective."""
        fit = partial(self._sklearn.fit, C, max_iterations=_MAX_ITERATIONS_SKLEARN)
        return fit_to_level(lambda tolerance: fit(tolerance=tolerance), partial(self.objective, C=C), level, loosest)

    def objective(self, model: LogisticModel, C: float) -> float:
        """See `objective`."""
        return objective(model, self.features.cpu(), self.labels.cpu(), C)

    def level(self, fit: Fit, C: float, best: float) -> float:
        """The objective that scikit-learn has to reach for the same result as a fit of ours."""
        reached, allowed = self.objective(fit.model, C), best * (1 + _GAP)
        if reached <= allowed or fit.unfinished:
            return max(reached, allowed)
        raise RuntimeError(f"C={C}: ours ended {reached / best - 1:.1e} above the optimum, more than {_GAP:.0e}")


def run(bench: Bench) -> None:
    """The sweep, its single values, and one value alone."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    samples, width, classes = (2000, 64, 10) if bench.quick else (20_000, 384, 100)
    where = f"{samples} x {width}, {classes} classes"
    names = {what: f"logistic regression, {where}, {what}" for what in ("sweep of 45 values of C", "one fit")}
    if not any(bench.wants(name) for name in names.values()):
        return
    with threadpool_limits(bench.threads):
        features, labels = (x.to(bench.device) for x in make_data(samples, width, classes))
        single, sweep = compare(Problem(features, labels), (10**C_POWER_RANGE).tolist(), every=11)
    for (name, target), (ours, theirs) in zip(
        ((names["one fit"], 2.0), (names["sweep of 45 values of C"], 5.0)), (single, sweep), strict=True
    ):
        bench.record(name, {"ours": [ours], "scikit-learn": [theirs]}, table=TABLE, unit="s", target=target)


def compare(problem: Problem, values: Sequence[float], every: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds of ours and of scikit-learn's: for the value in the middle alone, and for all."""
    previous: LogisticModel | None = None
    total_ours, total_theirs, loosest = problem.setup_s, 0.0, 4
    single = (0.0, 0.0)
    for i, C in enumerate(values):
        found = problem.ours(C, start=previous)
        previous = found.model
        total_ours += found.seconds
        if i % every:
            continue
        best = problem.best(C, found.model)
        other = problem.theirs(C, problem.level(found, C, best), loosest)
        loosest = round(-math.log10(other.tolerance))
        total_theirs += other.seconds * min(every, len(values) - i)
        print(f"    C={C:.3g}: ours {found}, scikit-learn {other}", flush=True)
        if i == len(values) // 2 // every * every:
            alone = problem.ours(C)
            problem.level(alone, C, best)
            single = (problem.setup_s + alone.seconds, other.seconds)
    return single, (total_ours, total_theirs)
