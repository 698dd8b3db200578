"""The Mask2Former head: pixel decoder and transformer decoder, with the sizes of the published one.

Source: Cheng et al., Masked-attention Mask Transformer for Universal Image Segmentation (2022).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.eval.segmentation.models.heads.mask2former_transformer_decoder import MultiScaleMaskedTransformerDecoder
from dinov3.eval.segmentation.models.heads.pixel_decoder import InputShape, MSDeformAttnPixelDecoder, names_by_stride

N_HEADS = 16
N_QUERIES = 100
N_ENCODER_LAYERS = 6
N_DECODER_LAYERS = 9
DIM_FEEDFORWARD = 4096


class Mask2FormerHead(nn.Module):
    """Classes and masks of 100 queries from maps of four scales.

    Args:
        input_shape: name of each map -> [channels, h, w, stride].
        hidden_dim: width of both decoders, and of the mask features.
        num_classes: K.
        loss_weight, ignore_value: kept for the training of the head; no effect here.
        transformer_in_feature: `multi_scale_pixel_decoder`: the transformer looks at the pixel decoder's maps.

    Raises:
        ValueError: another `transformer_in_feature`, or a width that 16 heads or 32 groups don't divide.
    """

    def __init__(
        self,
        input_shape: InputShape,
        hidden_dim: int = 2048,
        num_classes: int = 150,
        loss_weight: float = 1.0,
        ignore_value: int = -1,
        transformer_in_feature: str = "multi_scale_pixel_decoder",
    ) -> None:
        super().__init__()
        if transformer_in_feature != "multi_scale_pixel_decoder":
            raise ValueError(
                f"transformer_in_feature is 'multi_scale_pixel_decoder' only, got {transformer_in_feature!r}"
            )
        if hidden_dim % 32:
            raise ValueError(f"hidden_dim must be a multiple of 32 (groups of the norms), got {hidden_dim}")
        self.loss_weight = loss_weight
        self.ignore_value = ignore_value
        self.num_classes = num_classes
        self.pixel_decoder = MSDeformAttnPixelDecoder(
            input_shape,
            transformer_dropout=0.0,
            transformer_nheads=N_HEADS,
            transformer_dim_feedforward=DIM_FEEDFORWARD,
            transformer_enc_layers=N_ENCODER_LAYERS,
            conv_dim=hidden_dim,
            mask_dim=hidden_dim,
            norm="GN",
            transformer_in_features=names_by_stride(input_shape),
            common_stride=4,
        )
        self.predictor = MultiScaleMaskedTransformerDecoder(
            in_channels=hidden_dim,
            num_classes=num_classes,
            hidden_dim=hidden_dim,
            num_queries=N_QUERIES,
            nheads=N_HEADS,
            dim_feedforward=DIM_FEEDFORWARD,
            dec_layers=N_DECODER_LAYERS,
            pre_norm=False,
            mask_dim=hidden_dim,
            enforce_input_project=False,
        )

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Any]:
        """Predictions, at the size of the finest map; see `MultiScaleMaskedTransformerDecoder.forward`.

        Args:
            features: maps `[B, C, h, w]` by name.
        """
        mask_features, _, maps = self.pixel_decoder.forward_features(features)
        return self.predictor(maps, mask_features)

    def predict(self, features: Mapping[str, Tensor], rescale_to: Sequence[int] = (512, 512)) -> dict[str, Any]:
        """The same, with `pred_masks` (logits) resized bilinearly to (height, width) `rescale_to`."""
        output = self.forward(features)
        output["pred_masks"] = F.interpolate(
            output["pred_masks"], size=tuple(rescale_to), mode="bilinear", align_corners=False
        )
        return output
