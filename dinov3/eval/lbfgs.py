"""L-BFGS: minimise a smooth function of a vector (Nocedal and Wright 2006, "Numerical Optimization", section 7.2)."""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_MEMORY = 20  # pairs of steps and gradient changes that stand for the curvature
_MAX_TRIALS = 50  # of one line search
_SUFFICIENT_DECREASE, _CURVATURE = 1e-4, 0.9  # constants of the Wolfe conditions, as usual for quasi-Newton methods


class Value(NamedTuple):
    """A function at a point.

    Attributes:
        loss: float64 scalar.
        gradient: float64, of the shape of the point.
        slope: what the stopping rule looks at: a bound for it ends the search.
    """

    loss: Tensor
    gradient: Tensor
    slope: float


class Minimum(NamedTuple):
    """Where the search ended.

    Attributes:
        point: float64.
        value: the function there.
        iterations: number of steps.
        converged: a stopping rule was met; otherwise the number of iterations ran out.
    """

    point: Tensor
    value: Value
    iterations: int
    converged: bool


def minimize(
    function: Callable[[Tensor], Value], start: Tensor, *, max_iterations: int, slope_tolerance: float, precision: float
) -> Minimum:
    """Minimise `function` from `start`.

    It ends when the slope is at most `slope_tolerance`, or when a step gains less than `precision` times the loss:
    below the rounding error of the function nothing more can be found.

    Args:
        function: of a float64 vector.
        start: where to begin.
        max_iterations: number of steps at most.
        slope_tolerance: bound on `Value.slope`.
        precision: relative rounding error of the function.
    """
    point, value = start, function(start)
    pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=_MEMORY)
    for iteration in range(max_iterations):
        if value.slope <= slope_tolerance:
            return Minimum(point, value, iteration, converged=True)
        direction = -_times_inverse_hessian(value.gradient, pairs)
        # Half the descent is what a Newton step gains: not worth a search if rounding hides it.
        if pairs and -torch.dot(value.gradient, direction).item() / 2 <= precision * value.loss.abs().item():
            return Minimum(point, value, iteration, converged=True)
        found = _line_search(function, point, value, direction)
        if found is None and pairs:  # a stale memory of the curvature: once more along the gradient
            pairs.clear()
            found = _line_search(function, point, value, -value.gradient)
        if found is None:
            return Minimum(point, value, iteration, converged=True)  # no descent that this precision can see
        new_point, new_value = found
        step, change = new_point - point, new_value.gradient - value.gradient
        curvature = torch.dot(step, change).item()
        if curvature > 0:
            pairs.append((step, change, curvature))
        gain = (value.loss - new_value.loss).item()
        point, value = new_point, new_value
        if gain <= precision * max(abs(value.loss.item()), 1e-300) and value.slope > slope_tolerance:
            return Minimum(point, value, iteration + 1, converged=True)
    return Minimum(point, value, max_iterations, converged=value.slope <= slope_tolerance)


def _times_inverse_hessian(gradient: Tensor, pairs: deque[tuple[Tensor, Tensor, float]]) -> Tensor:
    """The two-loop recursion: the approximate inverse Hessian times the gradient."""
    result = gradient.clone()
    weights = []
    for step, change, curvature in reversed(pairs):
        weights.append(torch.dot(step, result) / curvature)
        result -= weights[-1] * change
    if pairs:
        step, change, curvature = pairs[-1]
        result *= curvature / torch.dot(change, change)
    for (step, change, curvature), weight in zip(pairs, reversed(weights), strict=True):
        result += (weight - torch.dot(change, result) / curvature) * step
    return result


def _line_search(
    function: Callable[[Tensor], Value], point: Tensor, value: Value, direction: Tensor
) -> tuple[Tensor, Value] | None:
    """A point along the direction that meets the weak Wolfe conditions, by bisection; None if there is no descent.

    Source: Burke, Lewis and Overton 2005, "A robust gradient sampling algorithm", section 4; Lewis and Overton 2013.
    """
    descent = torch.dot(value.gradient, direction).item()
    if not descent < 0:
        return None
    step, low, high = 1.0, 0.0, float("inf")
    best: tuple[Tensor, Value] | None = None
    for _ in range(_MAX_TRIALS):
        new_point = point + step * direction
        new_value = function(new_point)
        if not new_value.loss <= value.loss + _SUFFICIENT_DECREASE * step * descent:
            high = step
        else:
            best = new_point, new_value
            if torch.dot(new_value.gradient, direction).item() >= _CURVATURE * descent:
                return best
            low = step
        if high == float("inf"):
            step = 2 * low
        elif high - low > 1e-12 * high:
            step = (low + high) / 2
        else:
            break
    return best
