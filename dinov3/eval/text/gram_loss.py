"""Keeps similarities between patches, after the vision head, close to those of the backbone."""

import torch
from torch import Tensor

from dinov3.loss import GramLoss


def gram_loss_fn(
    backbone_patch_tokens: Tensor,
    patch_tokens: Tensor,
    patch_sampling_rate: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """Mean squared difference of the similarities between patches within each image.

    Args:
        backbone_patch_tokens, patch_tokens: of the same patches, `[B, P, D]` and `[B, P, D']`.
        patch_sampling_rate: part of the patches that is compared, the same random ones for all images.
        normalize: compare cosines instead of dot products.

    Returns:
        Scalar in float32.

    Raises:
        ValueError: shapes don't fit, or no patch is left.

    Note: draws one permutation of the patches from torch's CPU generator, also where all of them are used.
    """
    n_patches = patch_tokens.shape[1]
    n_chosen = int(n_patches * patch_sampling_rate)
    if not 1 <= n_chosen <= n_patches:
        raise ValueError(f"patch_sampling_rate={patch_sampling_rate} leaves {n_chosen} of {n_patches} patches")
    chosen = torch.randperm(n_patches)[:n_chosen].to(patch_tokens.device)
    loss: Tensor = GramLoss(apply_norm=normalize, remove_neg=False)(
        patch_tokens.index_select(1, chosen), backbone_patch_tokens.index_select(1, chosen)
    )
    return loss
