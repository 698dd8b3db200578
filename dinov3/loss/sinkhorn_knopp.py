"""The one Sinkhorn-Knopp normalisation of teacher logits, for CLS tokens and for patches."""

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3.loss.chunks import rows_per_chunk
from dinov3.loss.collectives import all_reduce, resolve_group


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor, temp: float | Tensor, *, n_iterations: int = 3, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Turn the logits of a group's samples into targets that use all prototypes evenly.

    Starting at exp(logits / temp), `n_iterations` times: every prototype is divided by its sum over all samples of the
    group, then every sample by its sum over prototypes. (The textbook form also keeps track of the number of samples
    and prototypes, factors that cancel because the last step makes samples sum to 1.)

    The first iteration is done with logarithms, so nothing overflows or vanishes for any range of logits. After it no
    sum can vanish: a prototype's largest entry is at least 1 / (samples * prototypes). The others work in place.

    Args:
        logits: this rank's samples, [n, K]; n may differ between ranks and may be 0. Not modified.
        temp: temperature of the teacher.
        n_iterations: at least 1.
        group: ranks whose samples are normalised together; None: the subgroup of this process.

    Returns:
        Probabilities [n, K] in float32 (float64 for float64 logits); rows sum to 1.

    Raises:
        ValueError: `logits` is not a matrix, or `n_iterations` is less than 1.

    Note:
        Collectives: an all-reduce of K numbers for the maximum and one per iteration.

    Source: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", section 3.1.
    """
    if logits.ndim != 2:
        raise ValueError(f"sinkhorn_knopp expects logits of shape [samples, prototypes], got {tuple(logits.shape)}")
    if n_iterations < 1:
        raise ValueError(f"n_iterations must be at least 1, got {n_iterations}")
    group = resolve_group(group)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True).div_(temp)
    scores -= _log_prototype_sums(scores, group)
    if scores.shape[0]:
        scores -= scores.amax(dim=1, keepdim=True)
    q = scores.exp_()
    q /= q.sum(dim=1, keepdim=True)
    for _ in range(n_iterations - 1):
        prototype_sums = q.sum(dim=0)
        all_reduce(prototype_sums, group)
        q /= prototype_sums
        q /= q.sum(dim=1, keepdim=True)
    return q


def _log_prototype_sums(scores: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log of the sum over the group's samples of exp(scores), [K], without a temporary of the size of `scores`."""
    n, n_prototypes = scores.shape
    largest = scores.amax(dim=0) if n else scores.new_full((n_prototypes,), -torch.inf)
    all_reduce(largest, group, op=dist.ReduceOp.MAX)
    sums = torch.zeros_like(largest)
    for rows in scores.split(rows_per_chunk(n_prototypes)):
        sums += (rows - largest).exp_().sum(dim=0)
    all_reduce(sums, group)
    return largest + sums.log_()
