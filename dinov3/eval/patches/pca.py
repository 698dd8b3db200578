"""Patch features as colours: their first three principal components."""

import torch
from torch import Tensor


def pca_colors(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Colours `[h, w, 3]` in [0, 1]: sigmoid of twice the whitened first three components; black outside the mask.

    The components are those of the patches in the mask, so that colours tell the parts of the object apart.

    Args:
        features: `[h, w, D]`.
        mask: booleans `[h, w]`, true in the foreground; default: everything.

    Raises:
        ValueError: fewer than four foreground patches.
    """
    h, w, dim = features.shape
    inside = torch.ones(h, w, dtype=torch.bool) if mask is None else mask.cpu()
    if inside.shape != (h, w):
        raise ValueError(f"the mask has shape {tuple(inside.shape)}, the patch grid is {(h, w)}")
    if inside.sum() < 4:
        raise ValueError(f"three components need at least 4 foreground patches, got {int(inside.sum())}")
    from sklearn.decomposition import PCA

    patches = features.detach().float().cpu()
    pca = PCA(n_components=3, whiten=True, random_state=0).fit(patches[inside].numpy())
    projected = torch.from_numpy(pca.transform(patches.view(-1, dim).numpy())).float().view(h, w, 3)
    return torch.sigmoid(2.0 * projected) * inside[..., None]
