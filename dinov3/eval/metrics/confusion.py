"""Which classes are taken for which: a metric that keeps pairs, and the table that can be made of them."""

import torch
from torch import Tensor

from dinov3.distributed import gather_all_tensors
from dinov3.eval.metrics.base import Metric


class ClassPairs(Metric):
    """The class and the best guess of every sample: key `pairs`, int64 `[N]`, `class * C + guess`.

    Pairs rather than a table: dozens of heads of a sweep are measured at once, and only the table of one is wanted.
    Samples without exactly one class are left out.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        super().__init__()

    def reset(self) -> None:
        """Forget everything collected so far."""
        self._pairs = [torch.zeros(0, dtype=torch.int64)]

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Keep the pairs of scores `[B, C]` and class numbers `[B]`."""
        if target.ndim == 1 and preds.ndim == 2 and preds.shape[1] == self.num_classes:
            self._pairs.append((target * self.num_classes + preds.argmax(1)).cpu())

    def own(self) -> Tensor:
        """The pairs of this process, int64 `[N]`."""
        return torch.cat(self._pairs)

    def compute(self) -> dict[str, Tensor]:
        """`{"pairs": [N]}` of all processes."""
        return {"pairs": torch.cat(gather_all_tensors(self.own()))}


def confusion_counts(pairs: Tensor, num_classes: int) -> Tensor:
    """How often each class (row) was taken for each class (column): int64 `[C, C]`."""
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
