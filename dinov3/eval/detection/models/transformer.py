"""Encoder, proposals, choice of queries, decoder.

Source: Lin et al., DETR Does Not Need Multi-Scale or Locality Design (2023); two stages and refinement as in Zhu et
al., Deformable DETR (2021); queries of two kinds as in Jia et al., DETRs with Hybrid Matching (2023).
"""

import math
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov3.eval.detection.config import DetectionHeadConfig, strides_of
from dinov3.eval.detection.models.decoder import DecoderOutput, Frame, init_decoder
from dinov3.eval.detection.models.global_ape_decoder import build_global_ape_decoder
from dinov3.eval.detection.models.global_rpe_decomp_decoder import build_global_rpe_decomp_decoder
from dinov3.eval.detection.models.proposals import (
    absolute_proposals,
    level_masks,
    level_projection,
    relative_proposals,
    valid_sides,
)
from dinov3.eval.detection.models.transformer_encoder import build_transformer_encoder
from dinov3.layers.sine_position_encoding import sine_encoding


class Heads(NamedTuple):
    """The detector's heads: of each decoder layer, and one more for the proposals (the last) if there are some."""

    class_embed: nn.ModuleList
    bbox_embed: nn.ModuleList


class Proposals(NamedTuple):
    """What the first stage says of all S proposals.

    Attributes:
        logits: `[B, S, classes]`.
        boxes: cxcywh `[B, S, 4]`.
        old: the boxes before they were moved, if boxes are in pixels.
        deltas: `[B, S, 4]`.
    """

    logits: Tensor
    boxes: Tensor
    old: Tensor
    deltas: Tensor


class TransformerOutput(NamedTuple):
    """What the detector's heads go on with.

    Attributes:
        decoder: of all queries.
        frame: what boxes are measured in.
        proposals: None without two stages.
    """

    decoder: DecoderOutput
    frame: Frame
    proposals: Proposals | None


class Queries(NamedTuple):
    """What the decoder starts from: content and position `[B, Q, C]`, boxes `[B, Q, 4]` or points `[B, Q, 2]`."""

    content: Tensor
    position: Tensor
    references: Tensor


class Transformer(nn.Module):
    """Detection transformer with boxes relative to each image.

    Attributes:
        two_stage_num_proposals: how many proposals become queries.

    Args:
        config: its `proposal_in_stride` must be set.
    """

    absolute = False

    def __init__(self, config: DetectionHeadConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.d_model, self.nheads = width, config.nheads
        self.two_stage, self.mixed_selection = config.two_stage, config.mixed_selection
        self.two_stage_num_proposals = config.num_queries
        self.proposal_min_size = config.proposal_min_size
        self.in_stride, self.strides = strides_of(config)
        self.level_embed = nn.Parameter(torch.empty(config.num_feature_levels, width))
        build = build_global_ape_decoder if config.decoder_type == "global_ape" else build_global_rpe_decomp_decoder
        self.decoder = build(config)
        self.encoder = build_transformer_encoder(config) if config.add_transformer_encoder else None
        if config.two_stage:
            self.enc_output, self.enc_output_norm = nn.Linear(width, width), nn.LayerNorm(width)
            self.pos_trans, self.pos_trans_norm = nn.Linear(2 * width, 2 * width), nn.LayerNorm(2 * width)
            if config.proposal_feature_levels > 1:
                self.enc_output_proj = nn.ModuleList(
                    level_projection(width, self.in_stride, stride) for stride in self.strides
                )
        else:
            self.reference_points = nn.Linear(width, 2)
        self._init_weights()

    def _init_weights(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.level_embed)
        init_decoder(self.decoder)

    def forward(
        self,
        features: Tensor,
        mask: Tensor,
        pos: Tensor,
        query_embed: Tensor | None,
        heads: Heads,
        self_attn_mask: Tensor | None = None,
    ) -> TransformerOutput:
        """Detect in projected feature maps.

        Args:
            features: `[B, C, h, w]`.
            mask: booleans `[B, h, w]`, true on padding.
            pos: position encoding `[B, C, h, w]`.
            query_embed: content of the queries `[Q, C]`; without two stages position and content `[Q, 2 C]`; None
                where the content comes from the proposals.
            heads: the detector's.
            self_attn_mask: booleans `[Q, Q]`, true where queries must not attend.
        """
        spatial_shape = (features.shape[-2], features.shape[-1])
        padding = mask.flatten(1)
        memory, positions = (x.flatten(2).transpose(1, 2) for x in (features, pos))
        positions = positions + self.level_embed[0]
        if self.encoder is not None:
            memory = self.encoder(memory, positions, padding)
        frame, proposals = Frame(None), None
        if self.two_stage:
            frame, proposals = self._propose(memory, padding, spatial_shape, heads)
            queries = self._choose(proposals, query_embed)
        else:
            if query_embed is None:
                raise ValueError("query_embed is needed: without two stages queries don't come from proposals")
            queries = self._learned(query_embed, memory.shape[0])
        n_queries = queries.content.shape[1]
        if self_attn_mask is not None:
            self_attn_mask = self_attn_mask[:n_queries, :n_queries]
        decoded = self.decoder(
            queries.content,
            queries.references,
            memory,
            positions,
            spatial_shape,
            padding,
            queries.position,
            bbox_embed=heads.bbox_embed,
            frame=frame,
            valid_ratios=self.get_valid_ratio(mask),
            self_attn_mask=self_attn_mask,
        )
        return TransformerOutput(decoded, frame, proposals)

    def get_valid_ratio(self, mask: Tensor) -> Tensor:
        """Part of the columns and rows of masks `[B, h, w]` that is not padding: (x, y) `[B, 2]`."""
        rows, columns = valid_sides(mask)
        return torch.stack([columns / mask.shape[2], rows / mask.shape[1]], dim=-1)

    def get_proposal_pos_embed(self, boxes: Tensor) -> Tensor:
        """Sine encoding of cxcywh boxes `[B, N, 4]`: float32 `[B, N, 2 C]`."""
        return sine_encoding(boxes.float() * (2 * math.pi), self.d_model // 2).flatten(2)

    def gen_encoder_output_proposals(
        self, memory: Tensor, memory_padding_mask: Tensor, spatial_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Proposals on all levels.

        Args:
            memory: tokens of the feature map `[B, h * w, C]`.
            memory_padding_mask: booleans `[B, h * w]`, true on padding.
            spatial_shapes: [(h, w)].

        Returns:
            Tokens of the S proposals `[B, S, C]`, made from zero for those not valid; their boxes `[B, S, 4]` (see
            `proposals.py`); heights and widths `[B]` of the images [pixels], None if boxes are relative.
        """
        mask = memory_padding_mask.unflatten(1, spatial_shapes[0])
        maps = [memory.transpose(1, 2).unflatten(2, spatial_shapes[0])]
        if len(self.strides) > 1:
            maps = [project(maps[0]) for project in self.enc_output_proj[: self._n_levels(spatial_shapes[0])]]
        masks = level_masks(mask, [(one.shape[-2], one.shape[-1]) for one in maps])
        boxes, valid, max_shape = self._boxes(masks)
        tokens = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], dim=1)
        tokens = tokens.masked_fill(~valid[..., None], 0.0)
        return self.enc_output_norm(self.enc_output(tokens)), boxes, max_shape

    def _n_levels(self, spatial_shape: tuple[int, int]) -> int:
        """How many levels have a cell in so small a map: the finer ones."""
        side = min(spatial_shape) * self.in_stride
        fitting = list(takewhile(lambda stride: stride <= side, self.strides))
        if not fitting:
            raise ValueError(
                f"proposals have a stride of {self.strides[0]} pixels, but the image only {side}: enlarge it"
            )
        return len(fitting)

    def _boxes(self, masks: list[Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        return *relative_proposals(masks), None

    def _propose(
        self, memory: Tensor, padding: Tensor, spatial_shape: tuple[int, int], heads: Heads
    ) -> tuple[Frame, Proposals]:
        tokens, start, max_shape = self.gen_encoder_output_proposals(memory, padding, [spatial_shape])
        logits, deltas = heads.class_embed[-1](tokens), heads.bbox_embed[-1](tokens)
        frame = Frame(max_shape)
        move = frame.move if self.absolute else frame.move_logits
        return frame, Proposals(logits, move(start, deltas), start, deltas)

    def _choose(self, proposals: Proposals, query_embed: Tensor | None) -> Queries:
        """The best proposals by their objectness, which is the logit of class 0; all, if there are fewer."""
        n = min(self.two_stage_num_proposals, proposals.logits.shape[1])
        best = proposals.logits[..., 0].topk(n, dim=1).indices
        boxes = proposals.boxes.gather(1, best[..., None].expand(-1, -1, 4)).detach()
        encoded = self.get_proposal_pos_embed(boxes).to(self.pos_trans.weight.dtype)
        position, content = self.pos_trans_norm(self.pos_trans(encoded)).split(self.d_model, dim=-1)
        if self.mixed_selection:
            if query_embed is None:
                raise ValueError("query_embed is needed: mixed_selection takes the content of queries from there")
            content = query_embed[:n].expand(boxes.shape[0], -1, -1)
        return Queries(content, position, boxes)

    def _learned(self, query_embed: Tensor, batch: int) -> Queries:
        position, content = (part.expand(batch, -1, -1) for part in query_embed.split(self.d_model, dim=-1))
        return Queries(content, position, self.reference_points(position).float().sigmoid())


class TransformerReParam(Transformer):
    """Detection transformer with boxes in pixels of the canvas."""

    absolute = True

    def _boxes(self, masks: list[Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        return absolute_proposals(masks, self.strides[: len(masks)], self.proposal_min_size)


def build_transformer(config: DetectionHeadConfig) -> Transformer:
    """The transformer of a configuration, whose `proposal_in_stride` must be set; initialised."""
    return TransformerReParam(config) if config.reparam else Transformer(config)
