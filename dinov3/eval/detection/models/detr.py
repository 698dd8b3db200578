"""The plain detector: frozen backbone, projection, transformer, heads; and what makes detections of its outputs.

Source: Lin et al., DETR Does Not Need Multi-Scale or Locality Design (2023); DINOv3 (2025), appendix on object
detection.
"""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.eval.detection.config import DetectionHeadConfig
from dinov3.eval.detection.models.backbone import BackboneWithPositions, build_backbone
from dinov3.eval.detection.models.transformer import Heads, Transformer, TransformerOutput, build_transformer
from dinov3.eval.detection.models.utils import MLP
from dinov3.eval.detection.util.box_ops import box_cxcywh_to_xyxy, clip_boxes
from dinov3.eval.detection.util.misc import NestedTensor, nested_tensor_from_tensor_list

__all__ = ["MLP", "PlainDETR", "PostProcess", "build_model"]

_PRIOR = 0.01  # probability of each class at the start


class PlainDETR(nn.Module):
    """A detector whose queries attend to one feature map.

    Attributes:
        num_queries: of both branches together, `num_queries_one2one` of which are matched one to one. At inference the
            former may be lowered to the latter; `transformer.two_stage_num_proposals` must follow.

    Args:
        backbone: with positions.
        transformer: its decoder has as many layers as `config` says.
        config: of the head.
    """

    def __init__(self, backbone: BackboneWithPositions, transformer: Transformer, config: DetectionHeadConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.config = config
        self.num_queries, self.num_queries_one2one = config.num_queries, config.num_queries_one2one
        self.transformer = transformer
        self.class_embed, self.bbox_embed = _build_heads(config)
        self.query_embed: nn.Embedding | None = None
        if not config.two_stage:
            self.query_embed = nn.Embedding(config.num_queries, 2 * width)
        elif config.mixed_selection:
            self.query_embed = nn.Embedding(config.num_queries, width)
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, kernel_size=1), nn.GroupNorm(32, width))
            for channels in backbone.num_channels
        )
        for projection in self.input_proj:
            convolution = projection[0]  # type: ignore[index]
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        self.backbone = backbone

    def forward(self, samples: Sequence[Tensor] | NestedTensor) -> dict[str, Any]:
        """Detect in a batch.

        Args:
            samples: normalised images `[3, H, W]`, whose sizes may differ, or a padded batch of them.

        Returns:
            `pred_logits` `[B, Q1, classes]` and `pred_boxes` `[B, Q1, 4]` (cxcywh, in pixels or relative to each image)
            of the last decoder layer; the same with `_one2many` for the other queries; if boxes are in pixels also
            `pred_boxes_old` (what the last layer started from) and `pred_deltas`. `aux_outputs` and
            `aux_outputs_one2many`: lists of such dictionaries for the layers before (if `aux_loss`). `enc_outputs`:
            such a dictionary for all proposals (if `two_stage`).
        """
        if not isinstance(samples, NestedTensor):
            samples = nested_tensor_from_tensor_list(samples, size_divisor=self.backbone.stride)
        features, mask, pos = self.backbone(samples)
        output = self.transformer(
            self.input_proj[0](features),
            mask,
            pos,
            None if self.query_embed is None else self.query_embed.weight[: self.num_queries],
            Heads(self.class_embed, self.bbox_embed),
            self._self_attention_mask(features.device),
        )
        return self._outputs(output)

    def _self_attention_mask(self, device: torch.device) -> Tensor | None:
        """True between queries of different branches; None if there is one branch."""
        if self.num_queries <= self.num_queries_one2one:
            return None
        branch = torch.arange(self.num_queries, device=device) < self.num_queries_one2one
        return branch[:, None] != branch

    def _outputs(self, output: TransformerOutput) -> dict[str, Any]:
        *earlier, last = self._levels(output)
        n = self.num_queries_one2one
        result: dict[str, Any] = {key: value[:, :n] for key, value in last.items()}
        result |= {f"{key}_one2many": value[:, n:] for key, value in last.items()}
        if self.config.aux_loss:
            result["aux_outputs"] = [{k: v[:, :n] for k, v in level.items()} for level in earlier]
            result["aux_outputs_one2many"] = [{k: v[:, n:] for k, v in level.items()} for level in earlier]
        if output.proposals is not None:
            logits, boxes, old, deltas = output.proposals
            result["enc_outputs"] = self._level(output, logits, boxes, old, deltas)
        return result

    def _levels(self, output: TransformerOutput) -> list[dict[str, Tensor]]:
        """Predictions of every decoder layer, of all queries."""
        levels = []
        states, references, deltas = output.decoder
        for head, state, reference, delta in zip(self.class_embed, states, references[:-1], deltas, strict=False):
            boxes = output.frame.move(reference, delta)
            levels.append(self._level(output, head(state), boxes, reference, delta))
        return levels

    def _level(
        self, output: TransformerOutput, logits: Tensor, boxes: Tensor, old: Tensor, deltas: Tensor
    ) -> dict[str, Tensor]:
        level = {"pred_logits": logits, "pred_boxes": boxes}
        if output.frame.max_shape is not None:
            level |= {"pred_boxes_old": old, "pred_deltas": deltas}
        return level


def _build_heads(config: DetectionHeadConfig) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Class and box heads, all of a kind equal at the start: no class likely, no box moved."""
    classes, boxes = nn.Linear(config.hidden_dim, config.num_classes), MLP(config.hidden_dim, config.hidden_dim, 4, 3)
    nn.init.constant_(classes.bias, -math.log((1 - _PRIOR) / _PRIOR))
    nn.init.zeros_(boxes.output.weight)
    nn.init.zeros_(boxes.output.bias)
    n = config.dec_layers + (1 if config.two_stage else 0)
    box_heads = [deepcopy(boxes) for _ in range(n)]
    if not config.two_stage:
        nn.init.constant_(box_heads[0].output.bias[2:], -2.0)  # boxes of an eighth of the image around the points
    return nn.ModuleList(deepcopy(classes) for _ in range(n)), nn.ModuleList(box_heads)


class PostProcess(nn.Module):
    """Detections of the best scores among all queries and classes.

    Args:
        topk: detections per image; all that there are, if fewer.
        reparam: boxes are in pixels; otherwise relative.
    """

    def __init__(self, topk: int = 100, reparam: bool = False) -> None:
        super().__init__()
        self.topk, self.reparam = topk, reparam

    @torch.no_grad()
    def forward(
        self,
        outputs: Mapping[str, Any],
        target_sizes: Tensor,
        original_target_sizes: Tensor | None = None,
    ) -> list[dict[str, Tensor]]:
        """Scores, labels and boxes.

        Args:
            outputs: of the detector.
            target_sizes: (H, W) of each image as the detector saw it, without padding `[B, 2]`.
            original_target_sizes: sizes that boxes are scaled to, if boxes are in pixels; None: `target_sizes`.

        Returns:
            For each image `scores` `[topk]`, descending, `labels` `[topk]` and `boxes` `[topk, 4]`, xyxy in pixels.
        """
        columns = zip(*self.best(outputs, target_sizes, original_target_sizes), strict=True)
        return [{"scores": scores, "labels": labels, "boxes": boxes} for scores, labels, boxes in columns]

    def best(
        self, outputs: Mapping[str, Any], target_sizes: Tensor, original_target_sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same for all images together: `[B, topk]`, `[B, topk]` and `[B, topk, 4]`."""
        probabilities = outputs["pred_logits"].float().sigmoid()
        batch, n_queries, n_classes = probabilities.shape
        if target_sizes.shape != (batch, 2):
            raise ValueError(f"expected target_sizes [{batch}, 2], got {tuple(target_sizes.shape)}")
        scores, order = probabilities.flatten(1).topk(min(self.topk, n_queries * n_classes), dim=1)
        queries = (order // n_classes)[..., None].expand(-1, -1, 4)
        boxes = box_cxcywh_to_xyxy(outputs["pred_boxes"].float()).gather(1, queries)
        height, width = (side[:, None] for side in target_sizes.to(boxes).unbind(1))
        if not self.reparam:
            boxes = boxes * torch.stack([width, height, width, height], dim=-1)
        else:
            boxes = clip_boxes(boxes, height, width)
            if original_target_sizes is not None:
                y, x = (original_target_sizes.to(boxes) / target_sizes.to(boxes)).unbind(1)
                boxes = boxes * torch.stack([x, y, x, y], dim=-1)[:, None]
        return scores, order % n_classes, boxes


def build_model(backbone_model: nn.Module, config: DetectionHeadConfig) -> PlainDETR:
    """A detector on a backbone, which it freezes.

    Args:
        backbone_model: a `Backbone`.
        config: of the head; `proposal_in_stride` is the backbone's stride if not set.

    Raises:
        ValueError: a stride or layers that the backbone doesn't have.
    """
    backbone = build_backbone(backbone_model, config)
    if config.proposal_in_stride not in (None, backbone.stride):
        raise ValueError(
            f"proposal_in_stride={config.proposal_in_stride}, but cells of this backbone's map are {backbone.stride} "
            "pixels wide: leave it out"
        )
    config = replace(config, proposal_in_stride=backbone.stride)
    return PlainDETR(backbone, build_transformer(config), config)
