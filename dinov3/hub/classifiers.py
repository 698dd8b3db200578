"""The classifier of the hub: one linear layer on a frozen ViT-7B/16, from images to the scores of ImageNet's classes.

    classifier = torch.hub.load(repo, "dinov3_vit7b16_lc", weights="head.pth", backbone_weights="7b.pth")
    scores = classifier(classifier.make_transform()(image)[None])  # [1, 1000]

Models come in evaluation mode.
"""

import os
from enum import Enum
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dinov3.hub.loading import NoInit, WeightsLike, load_backbone
from dinov3.hub.registry import BASE_URL, NORMALIZATIONS, Weights
from dinov3.hub.transforms import make_transform
from dinov3.models.backbone import Backbone

__all__ = ["ClassifierWeights", "LinearClassifier", "dinov3_vit7b16_lc"]


class ClassifierWeights(Enum):
    """What heads were trained on."""

    IMAGENET1K = "IMAGENET1K"


ClassifierWeightsLike = ClassifierWeights | str | os.PathLike[str]

# First digits of the SHA-256 of the released head of each backbone.
_HASHES = {("dinov3_vit7b16", ClassifierWeights.IMAGENET1K): "90d8ed92"}


class LinearClassifier(nn.Module):
    """A linear layer on the class token and the mean patch token, both normalised.

    Args:
        backbone: a `Backbone` of width D.
        num_classes: of the scores.

    Attributes:
        backbone: as given.
        linear_head: `nn.Linear(2 D, num_classes)`.
    """

    def __init__(self, backbone: nn.Module, num_classes: int = 1000) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear_head = nn.Linear(2 * cast(Backbone, backbone).embed_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (logits) of images `[B, 3, H, W]`: `[B, num_classes]`."""
        features = cast(Backbone, self.backbone).forward_features(images)
        mean_patch = features["x_norm_patchtokens"].mean(dim=1)
        scores: Tensor = self.linear_head(torch.cat([features["x_norm_clstoken"], mean_patch], dim=1))
        return scores


def dinov3_vit7b16_lc(
    *,
    pretrained: bool = True,
    weights: ClassifierWeightsLike = ClassifierWeights.IMAGENET1K,
    backbone_weights: WeightsLike = Weights.LVD1689M,
    check_hash: bool = False,
    **kwargs: Any,
) -> LinearClassifier:
    """Linear classifier of the 1000 classes of ImageNet on ViT-7B/16.

    Args:
        pretrained: False: random weights, of the backbone too.
        weights: of the head: `ClassifierWeights.IMAGENET1K`, its name, or a path or address of a head file, which holds
            `weight` and `bias`.
        backbone_weights: of the backbone; see `load_backbone`.
        check_hash: verify the SHA-256 digits in the names of both files.
        kwargs: `num_classes` of a head of your own (1000); `hash` replaces the digits in Meta's address of the head.

    Returns:
        The model in evaluation mode. Its attribute `normalization` holds mean and standard deviation of the images it
        takes, and `make_transform(resize_size=256)` gives the transform.

    Raises:
        TypeError: another keyword, or weights that are no name, path or address.
        ValueError: weights that don't fit: every tensor of the head must be there, and no other.
        FileNotFoundError, DownloadError: no weights there; the message says where they can be had.
    """
    return _make_dinov3_linear_classifier(
        backbone_name="dinov3_vit7b16",
        pretrained=pretrained,
        classifier_weights=weights,
        backbone_weights=backbone_weights,
        check_hash=check_hash,
        **kwargs,
    )


def _make_dinov3_linear_classifier(
    *,
    backbone_name: str = "dinov3_vit7b16",
    pretrained: bool = True,
    classifier_weights: ClassifierWeightsLike = ClassifierWeights.IMAGENET1K,
    backbone_weights: WeightsLike = Weights.LVD1689M,
    check_hash: bool = False,
    num_classes: int = 1000,
    hash: str | None = None,
) -> LinearClassifier:
    """Backbone of that name and head, both with released, own or random weights."""
    from dinov3.checkpointer.weights import load_weights, read_state_dict

    source = _resolve(backbone_name, classifier_weights, hash) if pretrained else None
    backbone = load_backbone(backbone_name, pretrained=pretrained, weights=backbone_weights, check_hash=check_hash)
    if source is None:
        model = LinearClassifier(backbone, num_classes)
    else:
        with NoInit():
            model = LinearClassifier(backbone, num_classes)
        try:
            load_weights(model.linear_head, read_state_dict(source, check_hash=check_hash))
        except ValueError as error:
            raise ValueError(f"linear head on {backbone_name}, weights={os.fspath(source)}: {error}") from error
    # The head was trained on ImageNet's statistics, whatever its backbone was trained on.
    normalization = NORMALIZATIONS[Weights.LVD1689M]
    model.normalization = normalization  # type: ignore[assignment]
    model.make_transform = partial(make_transform, normalization=normalization)  # type: ignore[assignment]
    return model.eval()


def _resolve(backbone_name: str, weights: Any, hash: str | None) -> str | os.PathLike[str]:
    """Where the head's weights are."""
    member = ClassifierWeights.__members__.get(weights.upper()) if isinstance(weights, str) else weights
    if isinstance(member, ClassifierWeights):
        known = _HASHES.get((backbone_name, member))
        if known is None:
            raise ValueError(f"there is no released linear head on {backbone_name}: give a path or an address")
        return f"{BASE_URL}/{backbone_name}/{backbone_name}_{member.value.lower()}_linear_head-{hash or known}.pth"
    if isinstance(weights, str | os.PathLike):
        return weights
    names = ", ".join(ClassifierWeights.__members__)
    raise TypeError(f"got {weights!r} for weights, expected one of {names}, a path or an address")
