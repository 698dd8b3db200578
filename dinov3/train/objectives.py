"""How the loss terms of the self-supervised objective are weighted (pure functions and plain data).

The terms themselves are in `dinov3.loss`; they are computed and summed in `SSLMetaArch.compute_losses`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov3.optim.schedules import warmup_cosine_from_epochs


def dino_pair_scales(n_global: int, n_local: int, ignore_diagonal: bool) -> tuple[float, float]:
    """Shares of the (global, local) DINO terms: each (student crop, teacher crop) pair counts once.

    With G global and L local crops there are G(G-1) global pairs (G*G if a crop may be compared with itself) and G*L
    local ones.
    """
    global_pairs = n_global * (n_global - 1) if ignore_diagonal else n_global**2
    local_pairs = n_global * n_local
    total = global_pairs + local_pairs
    return global_pairs / total, local_pairs / total


def loss_weight_schedule(cfg: Any, schedule: Any) -> NDArray[np.float64]:
    """One weight per training iteration from a config node `start, peak, end, warmup_epochs[, cosine_epochs]`."""
    return warmup_cosine_from_epochs(
        start=schedule.start,
        peak=schedule.peak,
        end=schedule.end,
        warmup_epochs=schedule.warmup_epochs,
        cosine_epochs=schedule.get("cosine_epochs"),
        epochs=cfg.optim.epochs,
        epoch_length=cfg.train.OFFICIAL_EPOCH_LENGTH,
    )


def weight_at(schedule: NDArray[np.float64] | None, constant: float, iteration: int) -> float:
    """The weight of a term: its schedule's value at the iteration, or the constant where there is no schedule."""
    return float(constant if schedule is None else schedule[iteration])
