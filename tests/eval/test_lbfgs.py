"""The minimiser: known minima, its stopping rules, hard functions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinov3.eval.lbfgs import Value, minimize


def _function(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Value]:
    def evaluate(point: Tensor) -> Value:
        point = point.detach().requires_grad_()
        value = loss(point)
        (gradient,) = torch.autograd.grad(value, point)
        return Value(value.detach(), gradient, gradient.abs().max().item())

    return evaluate


def test_an_ill_conditioned_quadratic() -> None:
    scale = torch.logspace(0, 5, 12, dtype=torch.float64)
    target = torch.arange(12, dtype=torch.float64)
    found = minimize(
        _function(lambda x: (scale * (x - target) ** 2).sum()),
        torch.zeros(12, dtype=torch.float64),
        max_iterations=500,
        slope_tolerance=1e-9,
        precision=0.0,
    )
    assert found.converged
    torch.testing.assert_close(found.point, target, atol=1e-9, rtol=0)


def test_a_curved_valley() -> None:
    found = minimize(
        _function(lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2),
        torch.tensor([-1.2, 1.0], dtype=torch.float64),
        max_iterations=200,
        slope_tolerance=1e-10,
        precision=0.0,
    )
    torch.testing.assert_close(found.point, torch.ones(2, dtype=torch.float64), atol=1e-8, rtol=0)
    assert found.iterations < 80


def test_it_stops_at_once_at_a_minimum_and_when_the_iterations_run_out() -> None:
    square = _function(lambda x: (x**2).sum() + x.exp().sum())
    start = torch.full((3,), 5.0, dtype=torch.float64)
    early = minimize(square, start, max_iterations=2, slope_tolerance=1e-12, precision=0.0)
    assert (early.iterations, early.converged) == (2, False)
    done = minimize(square, start, max_iterations=100, slope_tolerance=1e-9, precision=0.0)
    again = minimize(square, done.point, max_iterations=100, slope_tolerance=1e-9, precision=0.0)
    assert (again.iterations, again.converged) == (0, True)
    none = minimize(square, start, max_iterations=0, slope_tolerance=1e-9, precision=0.0)
    assert torch.equal(none.point, start)


@pytest.mark.parametrize("noise", [1e-9, 1e-6])
def test_rounding_noise_ends_the_search_near_the_minimum(noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, calls = _function(lambda x: ((x - 3) ** 2).sum() + 10), 0

    def noisy(point: Tensor) -> Value:
        nonlocal calls
        calls += 1
        value = clean(point)
        factor = 1 + noise * torch.randn((), generator=generator, dtype=torch.float64)
        return value._replace(loss=value.loss * factor)

    found = minimize(
        noisy, torch.zeros(4, dtype=torch.float64), max_iterations=1000, slope_tolerance=0.0, precision=10 * noise
    )
    assert found.converged
    assert calls < 120
    torch.testing.assert_close(found.point, torch.full_like(found.point, 3.0), atol=10 * noise**0.5, rtol=0)
