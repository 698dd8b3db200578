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

from dinov3.hub.loading import WeightsLike, load_backbone
from dinov3.hub.registry import NORMALIZATIONS, Weights
from dinov3.hub.released_heads import build_with_head, find_head
from dinov3.hub.transforms import make_transform
from dinov3.models.backbone import Backbone

__all__ = ["ClassifierWeights", "LinearClassifier", "dinov3_vit7b16_lc"]


class ClassifierWeights(Enum):
    """What heads were trained on."""

    IMAGENET1K = "IMAGENET1K"


ClassifierWeightsLike = ClassifierWeights | str | os.PathLike[str]

# First digits of the SHA-256 of the released head of each backbone.
_HASHES = {("dinov3_vit7b16", ClassifierWeights.IMAGENET1K): "90d8ed92"}
_resolve = partial(find_head, ClassifierWeights, _HASHES, what="linear head", suffix="linear_head")


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

    def graph_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """What an exported graph gives: `logits` `[B, num_classes]`."""
        return {"logits": self(images)}


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
    from dinov3.checkpointer.weights import load_weights

    source = _resolve(backbone_name, classifier_weights, hash) if pretrained else None
    backbone = load_backbone(backbone_name, pretrained=pretrained, weights=backbone_weights, check_hash=check_hash)
    model = build_with_head(
        lambda: LinearClassifier(backbone, num_classes),
        lambda model, state: load_weights(model.linear_head, state),
        source,
        what=f"linear head on {backbone_name}",
        check_hash=check_hash,
    )
    # The head was trained on ImageNet's statistics, whatever its backbone was trained on.
    normalization = NORMALIZATIONS[Weights.LVD1689M]
    model.normalization = normalization  # type: ignore[assignment]
    model.make_transform = partial(make_transform, normalization=normalization)  # type: ignore[assignment]
    return model.eval()
