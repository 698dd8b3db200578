"""Entry point of the released detector: a plain DETR head on a frozen backbone.

The class that it returns, `DetectorWithProcessor`, is defined in `dinov3.eval.detection.models.processor` and can be
imported from here too. Importing this file needs torch alone, calling its functions torchvision too.
"""

import os
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

from dinov3.hub.loading import WeightsLike, load_backbone
from dinov3.hub.registry import NORMALIZATIONS, Weights
from dinov3.hub.released_heads import build_with_head, find_head

if TYPE_CHECKING:
    from dinov3.eval.detection.config import DetectionHeadConfig
    from dinov3.eval.detection.models.processor import DetectorWithProcessor

__all__ = ["DetectionWeights", "DetectorWithProcessor", "dinov3_vit7b16_de", "make_transform"]


class DetectionWeights(Enum):
    """Data sets that detectors were trained on."""

    COCO2017 = "COCO2017"


# Windows per side by backbone. The second one has no released head.
_WINDOWS = {"dinov3_vit7b16": 3, "dinov3_vitl16plus": 2}
_HASHES = {("dinov3_vit7b16", DetectionWeights.COCO2017): "b0235ff7"}
_resolve = partial(find_head, DetectionWeights, _HASHES, what="detector", suffix="detr_head")


def __getattr__(name: str) -> Any:
    if name == "DetectorWithProcessor":
        from dinov3.eval.detection.models.processor import DetectorWithProcessor

        return DetectorWithProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def dinov3_vit7b16_de(
    *,
    pretrained: bool = True,
    weights: DetectionWeights | str | os.PathLike[str] = DetectionWeights.COCO2017,
    backbone_weights: WeightsLike = Weights.LVD1689M,
    check_hash: bool = False,
    hash: str | None = None,
) -> "DetectorWithProcessor":
    """ViT-7B/16 with a detector of 129 M parameters for the 80 classes of COCO.

        detector = dinov3_vit7b16_de(weights="path/to/head.pth", backbone_weights="path/to/backbone.pth")
        image = make_transform(1024)(Image.open("photo.jpg"))
        detections = detector([image], score_threshold=0.5)

    Args:
        pretrained: False: random weights; nothing is read.
        weights: of the head: a member of `DetectionWeights` or its name, a path, or a `file://` or `http(s)://`
            address.
        backbone_weights: what `load_backbone` takes.
        check_hash: verify the SHA-256 digits in the files' names, also of cached and local files.
        hash: replaces the digits in Meta's address.

    Returns:
        The detector in evaluation mode. Labels are COCO's category ids, 1 to 90 with gaps; `class_names` has their
        names.

    Raises:
        ValueError: weights that do not fit; all tensors of the head must be there.
        FileNotFoundError, DownloadError: no weights there; the message says where they can be had.
    """
    return _make_dinov3_detector(
        backbone_name="dinov3_vit7b16",
        pretrained=pretrained,
        detector_weights=weights,
        backbone_weights=backbone_weights,
        check_hash=check_hash,
        hash=hash,
    )


def _make_dinov3_detector(
    *,
    backbone_name: str = "dinov3_vit7b16",
    pretrained: bool = True,
    detector_weights: DetectionWeights | str | os.PathLike[str] = DetectionWeights.COCO2017,
    backbone_weights: WeightsLike = Weights.LVD1689M,
    check_hash: bool = False,
    hash: str | None = None,
) -> "DetectorWithProcessor":
    """A detector of the released recipe on one of the backbones that it is known for."""
    if backbone_name not in _WINDOWS:
        raise ValueError(f"no detector for {backbone_name!r}; there are recipes for {', '.join(_WINDOWS)}")
    source = _resolve(backbone_name, detector_weights, hash) if pretrained else None
    from dinov3.eval.detection.models.detr import PostProcess, build_model
    from dinov3.eval.detection.models.processor import DetectorWithProcessor, load_head_state, one_to_one
    from dinov3.eval.detection.util.coco_names import coco_class_names

    config = _head_config(backbone_name)
    backbone = load_backbone(backbone_name, pretrained=pretrained, weights=backbone_weights, check_hash=check_hash)
    detector = build_with_head(
        lambda: build_model(backbone, config),
        load_head_state,
        source,
        what=f"detector on {backbone_name}",
        check_hash=check_hash,
    )
    processor = PostProcess(config.topk, config.reparam)
    return DetectorWithProcessor(one_to_one(detector), processor, coco_class_names()).eval()


def _head_config(backbone_name: str) -> "DetectionHeadConfig":
    """The head of the released detector."""
    from dinov3.eval.detection.config import DetectionHeadConfig

    return DetectionHeadConfig(
        num_queries_one2one=1500,
        num_queries_one2many=1500,
        hidden_dim=768,
        topk=1500,
        n_windows_sqrt=_WINDOWS[backbone_name],
    )


def make_transform(resize_size: int = 2048) -> Any:
    """A transform from a PIL image or uint8 tensor to the normalised float32 tensor `[3, H, W]` for the detector.

    Resized to a shorter side of `resize_size`, both sides then up to multiples of the patch. Needs torchvision.

    Args:
        resize_size: [pixels].
    """
    from dinov3.eval.detection.transforms import make_eval_transform

    normalization = NORMALIZATIONS[Weights.LVD1689M]
    return make_eval_transform(resize_size, mean=normalization.mean, std=normalization.std)
