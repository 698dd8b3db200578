"""The decoder whose cross attention knows where each cell lies relative to the edges of the query's box.

The bias (box-RPE) is a sum of a part by rows and a part by columns, each from a small network. It is never held for all
queries, cells and heads at once.

Source: Lin et al., DETR Does Not Need Multi-Scale or Locality Design (2023), section 3.
"""

import math
import sys
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov3.eval.detection.config import DetectionHeadConfig, strides_of
from dinov3.eval.detection.models.cross_attention import CrossAttention, attend, padding_bias
from dinov3.eval.detection.models.decoder import GlobalDecoder, build_decoder
from dinov3.utils.dtype import autocast_to

__all__ = ["GlobalCrossAttention", "GlobalDecoder", "build_global_rpe_decomp_decoder"]

# Numbers that a chunk of queries may need for its bias: 128 MiB in float32.
MAX_BIAS_NUMBERS = 2**25


class GlobalCrossAttention(CrossAttention):
    """Attention from queries to all cells, with a bias by the position of each cell relative to the query's box.

    Queries are handled in chunks, each with its own bias; in training a chunk's bias is computed again in the backward
    pass.

    Args:
        dim: width of all tokens.
        num_heads: a divisor of it.
        rpe_hidden_dim: width of the bias networks.
        rpe_type: "linear": offsets in pixels; "abs_log8": their logarithms, sign(d) log2(|d| + 1) / 3.
        feature_stride: pixels per cell.
        reparam: boxes are in pixels; otherwise relative to the map.
        max_bias_numbers: of one chunk; one query at least.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rpe_hidden_dim: int = 512,
        rpe_type: str = "linear",
        feature_stride: int = 16,
        reparam: bool = False,
        max_bias_numbers: int = MAX_BIAS_NUMBERS,
    ) -> None:
        super().__init__(dim, num_heads)
        if rpe_type not in ("linear", "abs_log8"):
            raise ValueError(f"rpe_type must be 'linear' or 'abs_log8', got {rpe_type!r}")
        self.rpe_hidden_dim, self.rpe_type = rpe_hidden_dim, rpe_type
        self.feature_stride, self.reparam, self.max_bias_numbers = feature_stride, reparam, max_bias_numbers
        self.cpb_mlp1, self.cpb_mlp2 = (
            nn.Sequential(
                nn.Linear(2, rpe_hidden_dim), nn.ReLU(inplace=True), nn.Linear(rpe_hidden_dim, num_heads, bias=False)
            )
            for _ in range(2)
        )

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        key: Tensor,
        value: Tensor,
        spatial_shape: tuple[int, int],
        padding_mask: Tensor,
    ) -> Tensor:
        """Attend.

        Args:
            query: `[B, Q, C]`.
            reference_points: cxcywh boxes of the queries, `[B, Q, 1, 4]` or `[B, Q, 4]`, in pixels or relative to the
                map (see `reparam`).
            key, value: `[B, h * w, C]`.
            spatial_shape: (h, w).
            padding_mask: booleans `[B, h * w]`, true on padding.

        Returns:
            `[B, Q, C]`.
        """
        q, k, v = self.heads(self.q(query)), self.heads(self.k(key)), self.heads(self.v(value))
        boxes = self._pixels(reference_points.reshape(*query.shape[:2], 4), spatial_shape)
        n_queries, chunk = query.shape[1], self._chunk_size(query.shape[0], spatial_shape)
        attend_chunk = partial(self._attend, spatial_shape=spatial_shape)
        if torch.is_grad_enabled() and chunk < n_queries:
            attend_chunk = partial(checkpoint, attend_chunk, use_reentrant=False)
        padding = padding_bias(padding_mask)
        parts = zip(q.split(chunk, dim=2), boxes.split(chunk, dim=1), strict=True)
        return self.output(torch.cat([attend_chunk(part, near, k, v, padding) for part, near in parts], dim=2))

    def _attend(
        self, q: Tensor, boxes: Tensor, k: Tensor, v: Tensor, padding: Tensor, spatial_shape: tuple[int, int]
    ) -> Tensor:
        """Queries `[B, heads, n, d]` with boxes `[B, n, 4]` to the same."""
        height, width = spatial_shape
        by_row = self._bias(self.cpb_mlp2, boxes[..., 1::2], height)[..., :, None]  # [B, heads, n, h, 1]
        by_column = self._bias(self.cpb_mlp1, boxes[..., 0::2], width)[..., None, :]  # [B, heads, n, 1, w]
        return attend(q, k, v, (by_row + by_column).flatten(3) + padding)

    def _bias(self, network: nn.Module, edges: Tensor, n_cells: int) -> Tensor:
        """The part of one axis: edges `[B, n, 2]` in pixels to `[B, heads, n, cells]`, float32 whatever autocast says.

        Offsets of thousands of pixels would lose several of them in bfloat16.
        """
        centres = (torch.arange(n_cells, device=edges.device, dtype=torch.float32) + 0.5) * self.feature_stride
        offsets = edges[..., None, :].float() - centres[:, None]
        if self.rpe_type == "abs_log8":
            offsets = offsets.sign() * (offsets.abs() + 1).log2() / math.log2(8)
        with autocast_to(edges.device, torch.float32):
            bias: Tensor = network(offsets)
        return bias.permute(0, 3, 1, 2)

    def _pixels(self, boxes: Tensor, spatial_shape: tuple[int, int]) -> Tensor:
        """cxcywh boxes as float32 edges xyxy in pixels."""
        boxes = boxes.float()
        if not self.reparam:
            height, width = (n * self.feature_stride for n in spatial_shape)
            boxes = boxes * boxes.new_tensor([width, height, width, height])
        centre, size = boxes.split(2, dim=-1)
        return torch.cat([centre - size / 2, centre + size / 2], dim=-1)

    def _chunk_size(self, batch: int, spatial_shape: tuple[int, int]) -> int:
        """Queries whose bias, with what it is made of, takes `max_bias_numbers`."""
        if torch.compiler.is_exporting():  # the batch of a graph is open
            return sys.maxsize
        height, width = spatial_shape
        per_query = batch * (self.num_heads * height * width + (height + width) * self.rpe_hidden_dim)
        return max(1, self.max_bias_numbers // per_query)


def build_global_rpe_decomp_decoder(config: DetectionHeadConfig) -> GlobalDecoder:
    """The decoder of a configuration, whose `proposal_in_stride` must be set."""
    stride, _ = strides_of(config)
    return build_decoder(
        config,
        lambda: GlobalCrossAttention(
            config.hidden_dim,
            config.nheads,
            config.decoder_rpe_hidden_dim,
            config.decoder_rpe_type,
            stride,
            config.reparam,
        ),
    )
