"""The decoder: queries that attend to each other and to all cells, and whose boxes are refined layer by layer.

The kind of cross attention is given; see `global_rpe_decomp_decoder.py` and `global_ape_decoder.py`. The box heads
belong to the detector and come as an argument.

Source: Lin et al., DETR Does Not Need Multi-Scale or Locality Design (2023); Zhu et al., Deformable DETR (2021) for the
refinement; Zhang et al., DINO (2022) for looking forward twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov3.eval.detection.config import DetectionHeadConfig
from dinov3.eval.detection.util.box_ops import box_xyxy_to_cxcywh, delta2bbox
from dinov3.eval.detection.util.misc import inverse_sigmoid


@dataclass(frozen=True)
class Frame:
    """What boxes (cxcywh) are measured in, and how they move.

    Attributes:
        max_shape: heights and widths `[B]` of the images' parts of the canvas [pixels], if boxes are in pixels; None:
            boxes are relative to these parts.
    """

    max_shape: tuple[Tensor, Tensor] | None

    def move(self, references: Tensor, deltas: Tensor) -> Tensor:
        """Boxes `[B, N, 4]` of references `[B, N, 4]` (points `[B, N, 2]`, if relative) moved by deltas."""
        if self.max_shape is None:
            return self.move_logits(inverse_sigmoid(references.float()), deltas)
        height, width = (side.float()[:, None] for side in self.max_shape)
        return box_xyxy_to_cxcywh(delta2bbox(references, deltas, (height, width)))

    def move_logits(self, logits: Tensor, deltas: Tensor) -> Tensor:
        """Relative boxes, whose logits `[B, N, 4]` (or of points `[B, N, 2]`) are given, moved by deltas."""
        if logits.shape[-1] == 2:
            logits = F.pad(logits, (0, 2))
        return (deltas.float() + logits).sigmoid()


class DecoderOutput(NamedTuple):
    """Of all L layers.

    Attributes:
        states: queries after each layer `[L, B, Q, C]`, normalised if the decoder is pre-norm.
        references: L + 1 tensors `[B, Q, 4]`: entry l is what `deltas[l]` move, entry l + 1 the result.
        deltas: what the box heads say, `[L, B, Q, 4]`.
    """

    states: Tensor
    references: list[Tensor]
    deltas: Tensor


class GlobalDecoderLayer(nn.Module):
    """Self-attention, cross attention and a feed-forward network, each with a residual connection.

    Args:
        cross_attn: called with (queries, boxes, keys, values, (h, w), padding).
        d_model: width of the tokens.
        d_ffn: width of the hidden layer.
        dropout: in the self-attention, on every branch and on the hidden layer.
        n_heads: of the self-attention.
        norm_type: "pre_norm": LayerNorms before the branches; "post_norm": after the sums.
    """

    def __init__(
        self,
        cross_attn: nn.Module,
        d_model: int = 256,
        d_ffn: int = 1024,
        dropout: float = 0.1,
        n_heads: int = 8,
        norm_type: str = "pre_norm",
    ) -> None:
        super().__init__()
        self.cross_attn = cross_attn
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(d_model)
        self.linear1, self.linear2 = nn.Linear(d_model, d_ffn), nn.Linear(d_ffn, d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = norm_type == "pre_norm"

    def forward(
        self,
        tgt: Tensor,
        query_pos: Tensor,
        boxes: Tensor,
        src: Tensor,
        src_pos: Tensor,
        spatial_shape: tuple[int, int],
        padding_mask: Tensor,
        self_attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Queries `[B, Q, C]` to the same; see `GlobalDecoder.forward` for the arguments."""

        def attend_to_each_other(x: Tensor) -> Tensor:
            query = x + query_pos
            result: Tensor = self.self_attn(query, query, x, attn_mask=self_attn_mask, need_weights=False)[0]
            return result

        def attend_to_cells(x: Tensor) -> Tensor:
            result: Tensor = self.cross_attn(x + query_pos, boxes, src + src_pos, src, spatial_shape, padding_mask)
            return result

        tgt = self._block(tgt, attend_to_each_other, self.norm2)
        tgt = self._block(tgt, attend_to_cells, self.norm1)
        return self._block(tgt, self._feed_forward, self.norm3)

    def _block(self, x: Tensor, branch: Callable[[Tensor], Tensor], norm: nn.Module) -> Tensor:
        if self.pre_norm:
            return x + self.dropout(branch(norm(x)))
        normed: Tensor = norm(x + self.dropout(branch(x)))
        return normed

    def _feed_forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return result


class GlobalDecoder(nn.Module):
    """Layers one after another, each starting from the boxes that the one before has refined.

    Args:
        layers: of the decoder.
        d_model: width of the tokens.
        norm_type: "pre_norm" decoders have one more LayerNorm, on every layer's output.
        with_box_refine: False: all layers start from the first boxes.
        look_forward_twice: gradients of a layer's boxes reach the deltas of the layer before.
        use_checkpoint: compute layers again in the backward pass.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        d_model: int,
        norm_type: str = "pre_norm",
        with_box_refine: bool = True,
        look_forward_twice: bool = True,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.final_layer_norm = nn.LayerNorm(d_model) if norm_type == "pre_norm" else nn.Identity()
        self.with_box_refine, self.look_forward_twice = with_box_refine, look_forward_twice
        self.use_checkpoint = use_checkpoint

    def forward(
        self,
        tgt: Tensor,
        reference_points: Tensor,
        src: Tensor,
        src_pos: Tensor,
        spatial_shape: tuple[int, int],
        padding_mask: Tensor,
        query_pos: Tensor,
        *,
        bbox_embed: Sequence[nn.Module] | nn.ModuleList,
        frame: Frame,
        valid_ratios: Tensor | None = None,
        self_attn_mask: Tensor | None = None,
    ) -> DecoderOutput:
        """Refine boxes.

        Args:
            tgt, query_pos: content and position of the queries `[B, Q, C]`.
            reference_points: first boxes `[B, Q, 4]`, or points `[B, Q, 2]`.
            src, src_pos: content and position of the cells `[B, h * w, C]`.
            spatial_shape: (h, w).
            padding_mask: booleans `[B, h * w]`, true on padding.
            bbox_embed: the box head of each layer (further ones are not used).
            frame: what boxes are measured in.
            valid_ratios: part of the canvas that is image, (x, y) `[B, 2]`; needed for relative boxes.
            self_attn_mask: booleans `[Q, Q]`, true where queries must not attend.
        """
        states, references, deltas = [], [reference_points], []
        boxes = reference_points
        for layer, head in zip(self.layers, bbox_embed, strict=False):
            near = self._on_canvas(boxes, frame, valid_ratios)
            arguments = (tgt, query_pos, near, src, src_pos, spatial_shape, padding_mask, self_attn_mask)
            if self.use_checkpoint and torch.is_grad_enabled():
                tgt = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                tgt = layer(*arguments)
            state = self.final_layer_norm(tgt)
            delta = head(state)
            if self.with_box_refine:
                moved = frame.move(boxes, delta)
                boxes = moved.detach()
                references.append(moved if self.look_forward_twice else boxes)
            else:
                references.append(boxes)
            states.append(state)
            deltas.append(delta)
        return DecoderOutput(torch.stack(states), references, torch.stack(deltas))

    def _on_canvas(self, boxes: Tensor, frame: Frame, valid_ratios: Tensor | None) -> Tensor:
        """Boxes `[B, Q, 1, 4]` as the cross attention expects them: relative ones to the whole canvas."""
        if frame.max_shape is None and valid_ratios is not None:
            boxes = boxes * valid_ratios.repeat(1, boxes.shape[-1] // 2)[:, None]
        return boxes[:, :, None]


def build_decoder(config: DetectionHeadConfig, make_cross_attn: Callable[[], nn.Module]) -> GlobalDecoder:
    """The decoder of a configuration with cross attentions of the given kind, initialised."""
    width, norm_type = config.hidden_dim, config.norm_type
    layers = [
        GlobalDecoderLayer(make_cross_attn(), width, config.dim_feedforward, config.dropout, config.nheads, norm_type)
        for _ in range(config.dec_layers)
    ]
    decoder = GlobalDecoder(
        layers, width, norm_type, config.with_box_refine, config.look_forward_twice, config.decoder_use_checkpoint
    )
    init_decoder(decoder)
    return decoder


def init_decoder(decoder: nn.Module) -> None:
    """Every Linear from a normal distribution (0.02) cut at two deviations with bias 0; norms 1 and 0."""
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
