"""A linear classifier that tells foreground patches from background, trained on a few pictures with masks."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov3.eval.patches.sizes import patch_means

BACKGROUND, FOREGROUND = 0.01, 0.99
"""Patches with less, or with more, of the mask than this are trained on; those at the edge are not."""


class LabelledPatches(NamedTuple):
    """Patches of one picture that are clearly foreground or background.

    Attributes:
        features: float32 `[n, D]`.
        labels: booleans `[n]`, true for foreground.
    """

    features: Tensor
    labels: Tensor


def is_clear(means: Tensor) -> Tensor:
    """Which patches are clearly inside or outside, from the mean of the mask over each."""
    return (means < BACKGROUND) | (means > FOREGROUND)


def label_patches(features: Tensor, mask: Tensor, patch_size: int) -> LabelledPatches:
    """Clear patches of a picture.

    Args:
        features: `[h, w, D]`.
        mask: `[h * patch_size, w * patch_size]` with values in [0, 1].
        patch_size: of the backbone.
    """
    means = patch_means(mask, patch_size).cpu()
    if means.shape != features.shape[:2]:
        raise ValueError(f"the mask covers {tuple(means.shape)} patches, the features {tuple(features.shape[:2])}")
    clear = is_clear(means)
    return LabelledPatches(features.detach().float().cpu()[clear], means[clear] > 0)


class ForegroundClassifier:
    """Logistic regression on patch features.

    Args:
        weight: `[D]`.
        bias: a number.
    """

    def __init__(self, weight: Tensor, bias: float) -> None:
        self.weight, self.bias = weight, bias

    @classmethod
    def fit(
        cls, pictures: Sequence[LabelledPatches], C: float = 0.1, max_iter: int = 100_000
    ) -> "ForegroundClassifier":
        """Train with scikit-learn; `C` is the inverse strength of the regularisation."""
        from sklearn.linear_model import LogisticRegression

        features = torch.cat([picture.features for picture in pictures]).numpy()
        labels = torch.cat([picture.labels for picture in pictures]).numpy()
        if labels.all() or not labels.any():
            raise ValueError("the pictures have patches of one kind only: both foreground and background are needed")
        model = LogisticRegression(random_state=0, C=C, max_iter=max_iter).fit(features, labels)
        return cls(torch.from_numpy(model.coef_[0]).float(), float(model.intercept_[0]))

    def score(self, features: Tensor, *, smooth: bool = False) -> Tensor:
        """Probability of foreground `[h, w]` of patches `[h, w, D]`; `smooth` takes the median over 3 x 3 patches."""
        if features.shape[-1] != len(self.weight):
            raise ValueError(f"the classifier knows {len(self.weight)} features, got {features.shape[-1]}")
        score = torch.sigmoid(features.float() @ self.weight.to(features.device) + self.bias)
        if not smooth:
            return score
        from scipy.signal import medfilt2d

        return torch.from_numpy(medfilt2d(score.cpu().numpy(), kernel_size=3)).to(score.device)

    def save(self, path: str | Path) -> None:
        """Write `.npz`, or the scikit-learn pickle `.pkl` that the published notebooks exchange."""
        path = Path(path)
        if path.suffix == ".npz":
            np.savez(path, weight=self.weight.numpy(), bias=np.float64(self.bias))
        elif path.suffix == ".pkl":
            path.write_bytes(pickle.dumps(self._as_sklearn()))
        else:
            raise ValueError(f"a classifier is saved as .npz or .pkl, got {path.name}")

    @classmethod
    def load(cls, path: str | Path, *, trust_pickle: bool = False) -> "ForegroundClassifier":
        """Read what `save` or the published notebook wrote.

        Args:
            path: `.npz`, or `.pkl`. A pickle runs code when it is read.
            trust_pickle: read a pickle; say so only for your own file.
        """
        path = Path(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return cls(torch.from_numpy(file["weight"]), float(file["bias"]))
        if not trust_pickle:
            raise ValueError(
                f"{path.name} is a pickle, which can run any code when it is read: use the .npz file, or pass "
                "trust_pickle=True if you wrote it yourself"
            )
        model = pickle.loads(path.read_bytes())  # noqa: S301  (the caller has said so)
        return cls(torch.from_numpy(model.coef_[0]).float(), float(model.intercept_[0]))

    def _as_sklearn(self) -> object:
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(random_state=0)
        model.coef_ = self.weight.double().numpy()[None]
        model.intercept_ = np.array([self.bias])
        model.classes_ = np.array([False, True])
        model.n_features_in_ = len(self.weight)
        return model


def leave_one_out(pictures: Sequence[LabelledPatches], Cs: Sequence[float], max_iter: int = 10_000) -> Tensor:
    """Average precision `[len(Cs), pictures]` on each picture of a classifier trained on the others."""
    if len(pictures) < 2:
        raise ValueError(f"leaving one picture out needs at least two, got {len(pictures)}")
    from sklearn.metrics import average_precision_score

    table = torch.zeros(len(Cs), len(pictures))
    for row, C in enumerate(Cs):
        for held_out, picture in enumerate(pictures):
            others = [other for index, other in enumerate(pictures) if index != held_out]
            classifier = ForegroundClassifier.fit(others, C, max_iter)
            scores = classifier.score(picture.features)
            table[row, held_out] = average_precision_score(picture.labels.numpy(), scores.numpy())
    return table
