"""Logistic regression with an L2 penalty: the optimum that scikit-learn finds, on any device, in bounded memory.

The problem, for n samples x_i of D features and K outputs:

    minimise over W [K, D], b [K]:   (1/n) sum_i loss_i(W x_i + b)  +  |W|^2 / (2 C n)

with the softmax cross-entropy; for exactly two classes the logistic loss of a single output; for multi-hot labels one
logistic loss per label. It is convex: every solver ends at the same probabilities. Intercepts are not penalised.

How it is solved: L-BFGS in coordinates in which the curvature is nearly the same in all directions. The second
derivative is about `a_k S + I / (C n)`, S the second moment of the centred features and a_k the mean of p (1 - p) of
output k. In the eigenvectors of S it is diagonal, and the penalty, a sum of squares, doesn't notice the rotation. A few
dozen steps are enough where hundreds are needed in the original coordinates. Products run in float32 first, and at the
end, if asked for, in float64; losses, gradients and steps are summed in float64 always.
"""

import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.eval.lbfgs import Minimum, Value, minimize

logger = logging.getLogger("dinov3")

# Numbers of a block of features or outputs: on the processor so many that they stay in its cache between steps.
_MAX_OUTPUTS, _CACHED_OUTPUTS = 2**24, 2**18
_MIN_ROWS = 256  # below that, products are slow
_FLOAT32_PRECISION = 1e-7  # of a loss that is summed in float64 from float32 products
_FLOAT64_PRECISION = 64 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class LogisticModel:
    """A fitted model.

    Attributes:
        weight: float64 `[K, D]`; K is 1 for two classes.
        bias: float64 `[K]`.
        classes: numbers of the classes that were in the train set, ascending; None for multi-hot labels.
        num_classes: columns of the probabilities.
        constant: of multi-hot labels: the probability (0 or 1) of labels that all samples of the train set agreed on,
            NaN for the others.
    """

    weight: Tensor
    bias: Tensor
    classes: Tensor | None
    num_classes: int
    constant: Tensor | None = None

    def predict_proba(self, features: Tensor) -> Tensor:
        """Probabilities, float64 `[N, num_classes]`; 0 for classes that the train set lacked."""
        blocks = features.split(max(1, _MAX_OUTPUTS // self.num_classes))
        return torch.cat([self._predict_block(block) for block in blocks])

    def _predict_block(self, features: Tensor) -> Tensor:
        outputs = features.to(self.weight.device, torch.float64) @ self.weight.T + self.bias
        if self.classes is None:
            assert self.constant is not None
            return torch.where(self.constant.isnan(), outputs.sigmoid(), self.constant)
        if len(self.classes) == 2:
            present = torch.cat([(-outputs).sigmoid(), outputs.sigmoid()], dim=1)
        else:
            present = outputs.softmax(1)
        result = present.new_zeros(len(present), self.num_classes)
        result[:, self.classes] = present
        return result


class LogisticRegression:
    """Fits models to one train set for any number of values of C.

    Args:
        features: float `[N, D]`; may stay on another device, from which blocks are then fetched for every step.
        labels: class numbers, int64 `[N]`, or multi-hot rows `[N, K]`.
        num_classes: columns of the probabilities; default: the largest label plus one, or the number of columns.
        dtype: float64: polish the solution in float64 products; float32: don't.
        device: where to compute; default: that of the features.

    Raises:
        ValueError: fewer than two classes, or features that aren't finite.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        num_classes: int | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"logistic regression computes in float32 or float64, got {dtype}")
        self.features, self.dtype, self.device = features, dtype, device or features.device
        labels = labels.to(self.device)
        self.classes: Tensor | None = None
        self.constant: Tensor | None = None
        if labels.ndim == 1:
            self.classes, self.targets = labels.unique(return_inverse=True)
            self.num_classes = num_classes or int(labels.max()) + 1
            if len(self.classes) < 2:
                raise ValueError(
                    f"logistic regression needs samples of at least two classes, got {self.classes.tolist()}"
                )
            self.n_outputs = 1 if len(self.classes) == 2 else len(self.classes)
        else:
            rate = labels.double().mean(0)
            self.constant = torch.where((rate == 0) | (rate == 1), rate, torch.nan)
            self.targets, self.num_classes, self.n_outputs = labels, labels.shape[1], labels.shape[1]
        self._find_coordinates()

    def _find_coordinates(self) -> None:
        """Mean of the features, and the directions in which they vary, with the variances."""
        n, dim = self.features.shape
        total = torch.zeros(dim, dtype=torch.float64, device=self.device)
        moment = torch.zeros(dim, dim, dtype=torch.float64, device=self.device)
        for block in self.features.split(max(1, _MAX_OUTPUTS // dim)):
            block = block.to(self.device, torch.float64)
            total += block.sum(0)
            moment += block.T @ block
        self.mean = total / n
        variances, directions = torch.linalg.eigh(moment / n - torch.outer(self.mean, self.mean))
        if not torch.isfinite(variances).all():
            raise ValueError("the features hold values that are not finite")
        # Starting at zero, weights never leave the span of the features: directions without variance can go.
        kept = variances > variances[-1] * 1e-12
        self.variances, self.directions = variances[kept], directions[:, kept].contiguous()

    def fit(
        self, C: float, *, tolerance: float, max_iterations: int, start: LogisticModel | None = None
    ) -> LogisticModel:
        """The model for this C.

        Args:
            C: inverse strength of the penalty.
            tolerance: the largest entry of the gradient (of W and b) at which to stop.
            max_iterations: steps at most; a warning tells if they were not enough.
            start: model of a neighbouring C to begin with; default: zero.
        """
        weight = self.mean.new_zeros(self.n_outputs, len(self.mean)) if start is None else start.weight
        bias = self.mean.new_zeros(self.n_outputs) if start is None else start.bias
        found: Minimum | None = None
        iterations = 0
        stages = [(torch.float32, max(tolerance, 1e-6), _FLOAT32_PRECISION)]
        if self.dtype == torch.float64:
            stages.append((torch.float64, tolerance, _FLOAT64_PRECISION))
        for dtype, slope_tolerance, precision in stages:
            problem = _Problem(self, C, weight, bias, dtype)
            found = minimize(
                problem.evaluate,
                problem.start,
                max_iterations=max_iterations - iterations,
                slope_tolerance=slope_tolerance,
                precision=precision,
            )
            iterations += found.iterations
            weight, bias = problem.weight_and_bias(found.point)
        assert found is not None
        if not found.converged:
            logger.warning(
                "logistic regression with C=%g: largest gradient %.2g after %d iterations, wanted %.2g",
                *(C, found.value.slope, iterations, tolerance),
            )
        return LogisticModel(weight, bias, self.classes, self.num_classes, self.constant)


class _Problem:
    """The objective for one C, as a function of one vector in coordinates of even curvature."""

    def __init__(self, data: LogisticRegression, C: float, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        self.data, self.dtype = data, dtype
        self.n = len(data.features)
        self.penalty = 1.0 / (C * self.n)
        self.curvature = torch.ones(data.n_outputs, dtype=torch.float64, device=weight.device)
        self.curvature = self._mean_curvature(weight, bias)
        # Widths of the coordinates: square roots of the approximate second derivatives.
        self.scale = (self.curvature[:, None] * data.variances + self.penalty).sqrt()  # [K, r]
        self.bias_scale = self.curvature.sqrt()
        self.start = self._to_point(weight, bias)

    def weight_and_bias(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """W `[K, D]` and b `[K]` of a point."""
        coordinates, centred_bias = self._split(point)
        weight = (coordinates / self.scale) @ self.data.directions.T
        return weight, centred_bias / self.bias_scale - weight @ self.data.mean

    def _to_point(self, weight: Tensor, bias: Tensor) -> Tensor:
        coordinates = (weight @ self.data.directions) * self.scale
        centred_bias = (bias + weight @ self.data.mean) * self.bias_scale
        return torch.cat([coordinates.flatten(), centred_bias])

    def _split(self, point: Tensor) -> tuple[Tensor, Tensor]:
        coordinates, centred_bias = point.split([self.scale.numel(), len(self.bias_scale)])
        return coordinates.view_as(self.scale), centred_bias

    def evaluate(self, point: Tensor) -> Value:
        """Loss, gradient, and the largest entry of the gradient of W and b."""
        weight, bias = self.weight_and_bias(point)
        loss = weight.new_zeros(())
        weight_gradient, bias_gradient = torch.zeros_like(weight), torch.zeros_like(bias)
        for features, targets in self._blocks():
            outputs = features @ weight.T.to(self.dtype) + bias.to(self.dtype)
            losses, residuals = _loss_and_residuals(outputs, targets, self.data.classes is not None)
            loss += losses.sum(dtype=torch.float64)
            weight_gradient += residuals.T @ features
            bias_gradient += residuals.sum(0, dtype=torch.float64)
        loss = loss / self.n + 0.5 * self.penalty * weight.square().sum()
        weight_gradient = weight_gradient / self.n + self.penalty * weight
        bias_gradient /= self.n
        if self.data.constant is not None:  # labels that are always, or never, set have no finite optimum
            fitted = self.data.constant.isnan()
            weight_gradient, bias_gradient = weight_gradient * fitted[:, None], bias_gradient * fitted
        slope = max(weight_gradient.abs().max().item(), bias_gradient.abs().max().item())
        in_directions = (weight_gradient - torch.outer(bias_gradient, self.data.mean)) @ self.data.directions
        gradient = torch.cat([(in_directions / self.scale).flatten(), bias_gradient / self.bias_scale])
        return Value(loss, gradient, slope if math.isfinite(slope) else math.inf)

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and targets of some samples at a time, where and in what the products are computed."""
        numbers = _CACHED_OUTPUTS if self.data.device.type == "cpu" else _MAX_OUTPUTS
        rows = max(_MIN_ROWS, numbers // max(self.data.n_outputs, self.data.features.shape[1]))
        for features, targets in zip(self.data.features.split(rows), self.data.targets.split(rows), strict=True):
            yield features.to(self.data.device, self.dtype), targets

    def _mean_curvature(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Mean of p (1 - p) of each output at the start, float64 `[K]`."""
        total = torch.zeros_like(bias)
        single = self.data.classes is not None and self.data.n_outputs > 1
        for features, _ in self._blocks():
            outputs = features @ weight.T.to(self.dtype) + bias.to(self.dtype)
            p = outputs.softmax(1) if single else outputs.sigmoid()
            total += (p * (1 - p)).sum(0, dtype=torch.float64)
        return (total / self.n).clamp(min=1e-6)


def _loss_and_residuals(outputs: Tensor, targets: Tensor, single_label: bool) -> tuple[Tensor, Tensor]:
    """Losses of a block, and their derivatives with respect to the outputs `[n, K]`."""
    if single_label and outputs.shape[1] > 1:
        log_probabilities = outputs.log_softmax(1)
        losses = -log_probabilities.gather(1, targets[:, None])
        residuals = log_probabilities.exp_()
        residuals[torch.arange(len(targets), device=targets.device), targets] -= 1
        return losses, residuals
    wanted = targets.view(len(outputs), -1).to(outputs.dtype)
    losses = F.binary_cross_entropy_with_logits(outputs, wanted, reduction="none")
    return losses, outputs.sigmoid() - wanted


class SklearnLogisticRegression:
    """The same problem solved by scikit-learn (`lbfgs`, on the CPU): `LogisticRegression`'s oracle, and an option.

    Arguments as there. If `sklearnex` is installed, it speeds scikit-learn up.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, *, num_classes: int | None = None, dtype: torch.dtype = torch.float64
    ) -> None:
        self.features, self.labels = features.cpu().to(dtype).numpy(), labels.cpu()
        self.num_classes = num_classes or (int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1])

    def fit(
        self, C: float, *, tolerance: float, max_iterations: int, start: LogisticModel | None = None
    ) -> LogisticModel:
        """The model for this C; `start` has no effect."""
        if self.labels.ndim == 1:
            estimator = self._fit_one(self.labels, C, tolerance, max_iterations)
            weight, bias, classes = (
                torch.from_numpy(a) for a in (estimator.coef_, estimator.intercept_, estimator.classes_)
            )
            return LogisticModel(weight.double(), bias.double(), classes, self.num_classes)
        rate = self.labels.double().mean(0)
        constant = torch.where((rate == 0) | (rate == 1), rate, torch.nan)
        weight = torch.zeros(self.num_classes, self.features.shape[1], dtype=torch.float64)
        bias = torch.zeros(self.num_classes, dtype=torch.float64)
        for label in constant.isnan().nonzero().flatten().tolist():
            estimator = self._fit_one(self.labels[:, label], C, tolerance, max_iterations)
            weight[label], bias[label] = torch.from_numpy(estimator.coef_[0]), float(estimator.intercept_[0])
        return LogisticModel(weight, bias, None, self.num_classes, constant)

    def _fit_one(self, labels: Tensor, C: float, tolerance: float, max_iterations: int) -> Any:
        if find_spec("sklearnex") is not None:
            from sklearnex import patch_sklearn  # type: ignore[import-not-found,unused-ignore]

            patch_sklearn(verbose=False)
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression as Estimator

        estimator = Estimator(C=C, tol=tolerance, max_iter=max_iterations)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            estimator.fit(self.features, labels.numpy())
        if max(estimator.n_iter_) >= max_iterations:
            logger.warning(
                "scikit-learn's logistic regression with C=%g: %d iterations were not enough", C, max_iterations
            )
        return estimator
