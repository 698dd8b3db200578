"""Contrastive loss between images and texts over the batches of all processes.

Every process keeps its own rows and, gathered, the features of all; similarities exist as blocks of one process's rows
with another's, never as a whole. Backward passes need no communication: what they need of other processes was gathered
in the forward pass.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), figure 3.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dinov3.distributed import get_default_process_group


def memory_efficient_clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    check_sizes: bool = True,
) -> Tensor:
    """Contrastive loss of this process's pairs, against the images and texts of all processes.

    With s = logit_scale and l_ij = s <image_i, text_j> over the rows of all processes, n of them here:
    -1/(2n) sum_i (2 l_ii - log sum_j exp l_ij - log sum_j exp l_ji), where i runs over the rows of this process.
    The mean over processes is the loss of the joined batch.

    The gradients of `image` and `text` are those of the sum of the losses of all processes, and the gradient of
    `logit_scale` is the part that belongs to the similarities of this process's images. Averaged over processes, as
    data parallelism does, all are gradients of the loss of the joined batch.

    Args:
        image, text: features of n pairs `[n, D]`, usually L2-normalised.
        logit_scale: factor of similarities (not its logarithm), of one element.
        group: the processes; None: the world, or this process alone where there is no process group.
        check_sizes: compare n over the processes, which waits for the device. If it is off, n must be equal.

    Returns:
        Scalar in float32 (float64 for such features).

    Raises:
        ValueError: shapes don't fit, or processes have unequal numbers of rows.
    """
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            f"expected features of equal shape [n, D], got {tuple(image.shape)} for images and {tuple(text.shape)} for "
            "texts"
        )
    if not isinstance(logit_scale, Tensor):
        logit_scale = torch.tensor([float(logit_scale)], device=image.device)
    if logit_scale.numel() != 1:
        raise ValueError(f"logit_scale must have one element, got the shape {tuple(logit_scale.shape)}")
    group = get_default_process_group() if group is None else group
    if group is not None and group.size() == 1:
        group = None
    if check_sizes and group is not None:
        _check_sizes(image, group)
    loss: Tensor = MemoryEfficientClipLoss.apply(image, text, logit_scale, group)
    return loss


class MemoryEfficientClipLoss(torch.autograd.Function):
    """See `memory_efficient_clip_loss`; the group of several processes is an argument, or None."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """The loss of this process."""
        with torch.autocast(image.device.type, enabled=False):
            own_image, own_text = _wide(image).contiguous(), _wide(text).contiguous()
            scale = logit_scale.to(own_image.dtype).reshape(())
            images, texts = _gather(own_image, group), _gather(own_text, group)  # [W, n, D]
            own_logits = torch.linalg.vecdot(own_image, own_text) * scale  # [n]
            row_lse = _log_sum_exp(scale * block for _, block in _blocks(own_image, texts))  # [n], over all texts
            column_lse = _log_sum_exp(scale * block for _, block in _blocks(own_text, images))  # [n], over all images
            ctx.save_for_backward(
                image, text, logit_scale, images, texts, _gather(row_lse, group), _gather(column_lse, group)
            )
            ctx.rank = 0 if group is None else group.rank()
            return (row_lse + column_lse - 2 * own_logits).mean() / 2

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Gradients of images, texts and scale."""
        image, text, logit_scale, images, texts, row_lse, column_lse = ctx.saved_tensors
        rank, n = ctx.rank, image.shape[0]
        with torch.autocast(image.device.type, enabled=False):
            scale = logit_scale.to(images.dtype).reshape(())
            factor = grad_outputs[0] / (2 * n)
            grad_image, grad_text = torch.zeros_like(images[rank]), torch.zeros_like(texts[rank])
            grad_scale = torch.zeros_like(scale)
            for other, similarity in _blocks(images[rank], texts):  # own images with the texts of `other`
                weights = _weights(scale * similarity, row_lse[rank], column_lse[other], is_own=other == rank)
                grad_image += weights @ texts[other]
                grad_scale += (weights * similarity).sum()
            for other, similarity in _blocks(texts[rank], images):  # own texts with the images of `other`
                weights = _weights(scale * similarity, column_lse[rank], row_lse[other], is_own=other == rank)
                grad_text += weights @ images[other]
            return (
                (factor * scale * grad_image).to(image.dtype) if ctx.needs_input_grad[0] else None,
                (factor * scale * grad_text).to(text.dtype) if ctx.needs_input_grad[1] else None,
                (factor * grad_scale).reshape(logit_scale.shape).to(logit_scale.dtype)
                if ctx.needs_input_grad[2]
                else None,
                None,
            )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _blocks(own: Tensor, others: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(process, similarities [n, n] of own rows [n, D] with its rows), one process at a time."""
    for process in range(others.shape[0]):
        yield process, own @ others[process].mT


def _log_sum_exp(blocks: Iterator[Tensor]) -> Tensor:
    """Over the columns of all blocks: [n]."""
    return torch.stack([block.logsumexp(dim=1) for block in blocks]).logsumexp(dim=0)


def _weights(logits: Tensor, own_lse: Tensor, other_lse: Tensor, *, is_own: bool) -> Tensor:
    """2n times the derivative of the sum of all losses by the logits [n, n] of own rows and another process's.

    Both softmaxes of a pair, one over all partners of its image and one over those of its text, less 2 for true pairs.
    """
    weights = (logits - own_lse[:, None]).exp() + (logits - other_lse[None, :]).exp()
    if is_own:
        weights.diagonal().sub_(2)
    return weights


def _gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[W, ...]: `x` of all processes, in rank order."""
    if group is None:
        return x[None]
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


def _check_sizes(image: Tensor, group: dist.ProcessGroup) -> None:
    sizes = _gather(torch.tensor(image.shape, device=image.device), group)[:, 0].tolist()
    if len(set(sizes)) > 1:
        raise ValueError(
            f"processes must have equally many pairs, got {sizes}: leave out incomplete batches (drop_last)"
        )
