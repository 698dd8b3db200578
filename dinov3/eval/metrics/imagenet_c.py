"""Mean corruption error on ImageNet-C (Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", section 4.2): errors relative to AlexNet's, so that hard corruptions don't dominate.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dinov3.eval.metrics.base import Metric

LEVELS = 5

# Top-1 errors of AlexNet at severities 1 to 5, as published with the benchmark.
ALEXNET_ERRORS: dict[str, tuple[float, ...]] = {
    "BRIGHTNESS": (0.4514, 0.48502, 0.54048, 0.62166, 0.7244),
    "CONTRAST": (0.64548, 0.7615, 0.88874, 0.9776, 0.9927),
    "DEFOCUS_BLUR": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "ELASTIC_TRANSFORM": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "FOG": (0.67474, 0.7605, 0.84378, 0.8726, 0.945),
    "FROST": (0.6139, 0.79734, 0.8879, 0.89942, 0.9343),
    "GAUSSIAN_BLUR": (0.54732, 0.70444, 0.82574, 0.89864, 0.9594),
    "GAUSSIAN_NOISE": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "GLASS_BLUR": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "IMPULSE_NOISE": (0.78374, 0.89808, 0.9487, 0.9872, 0.99548),
    "JPEG_COMPRESSION": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
    "MOTION_BLUR": (0.5843, 0.70048, 0.82108, 0.8975, 0.92638),
    "PIXELATE": (0.52218, 0.5462, 0.73728, 0.87092, 0.91262),
    "SATURATE": (0.59342, 0.65514, 0.51174, 0.70834, 0.8226),
    "SHOT_NOISE": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "SNOW": (0.71726, 0.88392, 0.86468, 0.9187, 0.94952),
    "SPATTER": (0.47196, 0.62194, 0.75052, 0.84132, 0.90182),
    "SPECKLE_NOISE": (0.66192, 0.7444, 0.90246, 0.94548, 0.97268),
    "ZOOM_BLUR": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
}
CORRUPTION_TYPES = tuple(ALEXNET_ERRORS)  # the 19 names, sorted


def state_index(corruption: str, level: int) -> int:
    """Position of a corruption at a severity (1 to 5) in the states of the metric."""
    return LEVELS * CORRUPTION_TYPES.index(corruption.upper()) + level - 1


class ImageNet_C_Metric(Metric):
    """Mean corruption error, lower is better: key `top-1`, float64.

    For each corruption, the mean error over severities divided by AlexNet's mean error over the same severities; then
    the mean over corruptions. Severities and corruptions without samples are left out of both.

    Args:
        corruption_types: names that the corruption index of a target stands for; default: the 19 names sorted.

    Attributes:
        tp, total: correct and all samples of each corruption and severity (`state_index`), float `[95]`.
    """

    tp: Tensor
    total: Tensor

    def __init__(self, corruption_types: Sequence[str] = CORRUPTION_TYPES) -> None:
        unknown = [name for name in corruption_types if name.upper() not in ALEXNET_ERRORS]
        if unknown:
            raise ValueError(f"unknown corruptions {unknown}; known: {', '.join(CORRUPTION_TYPES)}")
        self.first_state = torch.tensor([state_index(name, 1) for name in corruption_types])
        zeros = torch.zeros(LEVELS * len(CORRUPTION_TYPES))
        super().__init__(tp=zeros, total=zeros)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count scores `[B, C]` against rows (class number, index of the corruption, severity 1 to 5), `[B, 3]`."""
        if target.ndim != 2 or target.shape[1] != 3:
            raise ValueError(
                f"ImageNet-C targets are rows (class, corruption, severity) [B, 3], got {tuple(target.shape)}"
            )
        label, corruption, level = target.unbind(1)
        state = self.first_state.to(target.device)[corruption] + level - 1
        correct = (preds.argmax(1) == label).to(self.tp.dtype)
        self.tp.index_add_(0, state, correct)
        self.total.index_add_(0, state, torch.ones_like(correct))

    def compute(self) -> dict[str, Tensor]:
        """`{"top-1": mean corruption error}`."""
        tp, total = self.merged("tp", "total")
        counted = (total > 0).view(-1, LEVELS)
        error = (1 - tp.double() / total.clamp(min=1)).view(-1, LEVELS)
        alexnet = torch.tensor(list(ALEXNET_ERRORS.values()), dtype=torch.float64, device=error.device)
        ours, theirs = (torch.where(counted, e, 0.0).sum(1) for e in (error, alexnet))  # equal counts cancel
        present = counted.any(1)
        return {"top-1": (ours[present] / theirs[present]).mean()}
