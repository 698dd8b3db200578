"""The one Sinkhorn-Knopp normalisation of teacher logits, for CLS tokens and for patches."""

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3.loss.chunks import rows_per_chunk
from dinov3.loss.collectives import all_reduce, resolve_group


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor,
    temp: float | Tensor,
    *,
    n_iterations: int = 3,
    group: dist.ProcessGroup | None = None,
    inplace: bool = False,
) -> Tensor:
    """Turn the logits of a group's samples into targets that use all prototypes evenly.

    Starting at exp(logits / temp), `n_iterations` times: every prototype is divided by its sum over all samples of the
    group, then every sample by its sum over prototypes. (The textbook form also keeps track of the number of samples
    and prototypes, factors that cancel because the last step makes samples sum to 1.)

    The first iteration is done with logarithms, so nothing overflows or vanishes for any range of logits. After it no
    sum can vanish: a prototype's largest entry is at least 1 / (samples * prototypes).

    The matrix is read or written once for each sum over samples that there is to wait for: while some rows are in the
    cache they are divided by the prototypes' sums, then by their own, and are added to the next sums.

    Args:
        logits: this rank's samples, [n, K]; n may differ between ranks and may be 0.
        temp: temperature of the teacher.
        n_iterations: at least 1.
        group: ranks whose samples are normalised together; None: the subgroup of this process.
        inplace: the targets take the place of logits in float32 (or float64), which saves a matrix of that size.
            Otherwise, and for narrower logits, `logits` are not modified.

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
    logits, dtype = logits.detach(), torch.promote_types(logits.dtype, torch.float32)
    step = rows_per_chunk(logits.shape[1], logits.device)
    log_prototype_sums = _log_prototype_sums(logits, temp, group)
    q = logits if inplace and logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    prototype_sums = torch.zeros_like(log_prototype_sums)
    for rows, row_logits in zip(q.split(step), logits.split(step), strict=True):
        scores = row_logits.to(dtype, copy=True).div_(temp).sub_(log_prototype_sums)
        # exp, not torch.softmax: on a CPU the errors of that are larger, and lean to one side
        torch.sub(scores, scores.amax(dim=1, keepdim=True), out=rows).exp_()
        rows /= rows.sum(dim=1, keepdim=True)
        prototype_sums += rows.sum(dim=0)
    for _ in range(n_iterations - 1):
        all_reduce(prototype_sums, group)
        divisors, prototype_sums = prototype_sums, torch.zeros_like(prototype_sums)
        for rows in q.split(step):
            rows /= divisors
            rows /= rows.sum(dim=1, keepdim=True)
            prototype_sums += rows.sum(dim=0)
    return q


def _log_prototype_sums(logits: Tensor, temp: float | Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log of the sum over the group's samples of exp(logits / temp), [K], in the dtype of the result."""
    n, n_prototypes = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    largest = logits.amax(dim=0) if n else logits.new_full((n_prototypes,), -torch.inf)
    largest = largest.to(dtype, copy=True).div_(temp)
    all_reduce(largest, group, op=dist.ReduceOp.MAX)
    sums = torch.zeros_like(largest)
    for rows in logits.split(rows_per_chunk(n_prototypes, logits.device)):
        sums += rows.to(dtype, copy=True).div_(temp).sub_(largest).exp_().sum(dim=0)
    all_reduce(sums, group)
    return largest + sums.log_()
