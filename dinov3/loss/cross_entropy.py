"""Cross-entropy between soft targets and logits over very many prototypes, with little memory."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov3.loss.chunks import rows_per_chunk


def soft_cross_entropy(logits: Tensor, targets: Sequence[Tensor], temp: float) -> Tensor:
    """-sum_k targets[s][b, k] * log_softmax(logits[s, b] / temp)[k] for every row of every entry.

    Nothing of the size of `logits` is kept for the backward pass but the arguments themselves, and the only such
    tensor that is made is the gradient, in the dtype of `logits`: probabilities exist in float32 for a few rows at a
    time, and are computed again in the backward pass.

    Args:
        logits: [S, B, K], any floating dtype; computed in float32 (float64 for float64 logits).
        targets: S tensors [B, K], constants (they get no gradient), not necessarily summing to 1; the same tensor may
            stand for several entries.
        temp: temperature of the logits.

    Returns:
        [S, B] in float32.
    """
    result: Tensor = _SoftCrossEntropy.apply(logits, temp, *targets)
    return result


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, temp: float, *targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, *targets)
        ctx.temp = temp
        losses = logits.new_empty(logits.shape[:2], dtype=_compute_dtype(logits))
        for s, rows in _chunks(logits):
            log_probs = torch.log_softmax(logits[s, rows].to(losses.dtype) / temp, dim=-1)
            losses[s, rows] = -log_probs.mul_(targets[s][rows]).sum(dim=-1)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_losses,) = grad_outputs
        logits, *targets = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for s, rows in _chunks(logits):
            target = targets[s][rows].to(grad_losses.dtype)
            scores = logits[s, rows].to(grad_losses.dtype) / ctx.temp
            # Wide enough, the gradient itself holds the probabilities meanwhile
            probs = grad[s, rows] if grad.dtype == scores.dtype else torch.empty_like(scores)
            torch.softmax(scores, dim=-1, out=probs)
            probs.mul_(target.sum(dim=-1, keepdim=True)).sub_(target)
            torch.mul(probs, grad_losses[s, rows].unsqueeze(-1) / ctx.temp, out=grad[s, rows])
        return grad, None, *(None for _ in targets)


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _chunks(logits: Tensor) -> Iterator[tuple[int, slice]]:
    """(entry, rows) pairs that cover `logits` [S, B, K]."""
    n_entries, n_rows, n_prototypes = logits.shape
    step = rows_per_chunk(n_prototypes, logits.device)
    for s in range(n_entries):
        for start in range(0, n_rows, step):
            yield s, slice(start, start + step)
