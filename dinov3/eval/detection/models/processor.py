"""From images to detections: the detector with its post-processing, as the hub and `load_head` give it."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dinov3.checkpointer.heads import HeadFile
from dinov3.checkpointer.weights import load_weights
from dinov3.eval.detection.config import DetectionHeadConfig
from dinov3.eval.detection.models.detr import PlainDETR, PostProcess, build_model
from dinov3.eval.detection.transforms import IMAGENET_MEAN, IMAGENET_STD, make_eval_transform
from dinov3.eval.detection.util.misc import NestedTensor

# Where the frozen network's tensors lie in a detector's state dict, without windows and with them.
BACKBONE_PREFIXES = ("backbone.0.backbone.", "backbone.0._backbone.backbone.")
# Files of the released detector may name its heads a second time.
_ALIASES = "transformer.decoder."
_ALIASED = ("class_embed.", "bbox_embed.")


class DetectorWithProcessor(nn.Module):
    """A detector that returns boxes in pixels.

    Args:
        detector: gives outputs of a list of images.
        postprocessor: makes detections of them.
        class_names: name by label, "" where a label stands for nothing; None: not known.
    """

    def __init__(self, detector: nn.Module, postprocessor: nn.Module, class_names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.detector, self.postprocessor = detector, postprocessor
        self.class_names = None if class_names is None else list(class_names)
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD  # of the images, in [0, 1]

    graph_fixes_size = True
    """Windows and proposals of an exported graph are those of one size of images."""

    def graph_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """What an exported graph gives for images of one size `[B, 3, H, W]`.

        `scores` `[B, topk]`, descending, `labels` `[B, topk]`, and `boxes` `[B, topk, 4]`, xyxy in pixels.
        """
        n, _, height, width = images.shape
        padding = torch.zeros((n, height, width), dtype=torch.bool, device=images.device)
        sizes = torch.tensor([[height, width]], device=images.device).expand(n, -1)
        found = cast(PostProcess, self.postprocessor).best(self.detector(NestedTensor(images, padding)), sizes)
        return dict(zip(("scores", "labels", "boxes"), found, strict=True))

    def make_transform(self, short_side: int = 2048, max_size: int | None = None) -> Any:
        """A transform from an image (PIL, or uint8 tensor `[3, H, W]`) to the normalised `[3, H, W]` to detect in.

        Args:
            short_side: its shorter side becomes so long [pixels]; both are then rounded up to multiples of the patch.
            max_size: of the longer side [pixels].
        """
        stride = cast(PlainDETR, self.detector).backbone.stride
        return make_eval_transform(short_side, max_size, stride, self.mean, self.std)

    def forward(
        self,
        samples: Sequence[Tensor],
        *,
        score_threshold: float | None = None,
        original_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[dict[str, Tensor]]:
        """Detect.

        Args:
            samples: normalised images `[3, H, W]`; their sizes may differ. They share one canvas, and what an image
                gets depends a little on the size of it.
            score_threshold: leave out detections below it; None: leave out none.
            original_sizes: (H, W) of each image before it was resized: boxes are given in its pixels. None: in those
                of `samples`.

        Returns:
            For each image `scores` `[N]`, descending, `labels` `[N]` (int64) and `boxes` `[N, 4]`, xyxy.
        """
        images = list(samples)
        sizes = torch.tensor([image.shape[-2:] for image in images], device=images[0].device if images else None)
        if original_sizes is not None and len(original_sizes) != len(images):
            raise ValueError(f"got {len(original_sizes)} original sizes for {len(images)} images")
        outputs = self.detector(images)
        detections = cast(list[dict[str, Tensor]], self.postprocessor(outputs, sizes, sizes))
        if original_sizes is not None:
            detections = [
                _scaled(one, size, original)
                for one, size, original in zip(detections, sizes.tolist(), original_sizes, strict=True)
            ]
        if score_threshold is not None:
            detections = [above(one, score_threshold) for one in detections]
        return detections


def above(detections: dict[str, Tensor], score: float) -> dict[str, Tensor]:
    """The detections whose scores are not below a threshold."""
    keep = detections["scores"] >= score
    return {key: value[keep] for key, value in detections.items()}


def _scaled(one: dict[str, Tensor], size: list[int], original: tuple[int, int]) -> dict[str, Tensor]:
    y, x = (new / old for new, old in zip(original, size, strict=True))
    return one | {"boxes": one["boxes"] * one["boxes"].new_tensor([x, y, x, y])}


def one_to_one(detector: PlainDETR) -> PlainDETR:
    """The detector without its one-to-many queries, which serve the training alone; changed in place."""
    detector.num_queries = detector.transformer.two_stage_num_proposals = detector.num_queries_one2one
    return detector


def head_state(detector: nn.Module) -> dict[str, Tensor]:
    """The tensors of a detector but those of the frozen backbone, by name."""
    state = detector.state_dict()
    return {key: value for key, value in state.items() if not key.startswith(BACKBONE_PREFIXES)}


def load_head_state(detector: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a head's tensors into a detector, strictly.

    Entries of the backbone, and heads under their second names, may be there and are left out.

    Raises:
        ValueError: tensors missing, unknown or of another shape, or second names whose values differ.
    """
    state = {key: value for key, value in state.items() if not key.startswith(BACKBONE_PREFIXES)}
    for key in [key for key in state if key.removeprefix(_ALIASES).startswith(_ALIASED) and key.startswith(_ALIASES)]:
        value, name = state.pop(key), key.removeprefix(_ALIASES)
        if not torch.equal(state.setdefault(name, value), value):
            raise ValueError(f"the head file holds {name} twice, also as {key}, with different values: it is damaged")
    frozen = {key: value for key, value in detector.state_dict().items() if key.startswith(BACKBONE_PREFIXES)}
    load_weights(detector, frozen | state)


def build_from_head(backbone: nn.Module, head_file: HeadFile) -> DetectorWithProcessor:
    """The detector of a head file on its backbone, which is frozen.

    Args:
        backbone: a `Backbone`.
        head_file: its `config` holds `head` (fields of `DetectionHeadConfig`) and what else trainings write there.

    Raises:
        ValueError: tensors that don't fit.
    """
    config = DetectionHeadConfig(**head_file.config["head"])
    detector = build_model(backbone, config)
    load_head_state(detector, head_file.head)
    processor = PostProcess(config.topk, config.reparam)
    model = DetectorWithProcessor(one_to_one(detector), processor, head_file.class_names)
    model.mean, model.std = head_file.mean, head_file.std
    return model.eval()
