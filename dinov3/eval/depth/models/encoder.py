"""The frozen backbone of a depth model: any image size in, feature maps of chosen blocks out."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from dinov3.eval.depth.config import PatchSizeAdaptationStrategy
from dinov3.eval.depth.models.embed import patch_size_adapter
from dinov3.models.backbone import Backbone
from dinov3.models.features import BackboneLayersSet, layer_indices

LayerOutput = tuple[Tensor, Tensor]
"""Patch features `[B, C, h, w]` and class token `[B, C]` of one block."""


class DinoVisionTransformerWrapper(nn.Module):
    """A backbone that only gives features: always in evaluation mode, its parameters without gradients.

    Gradients with respect to the images are kept.

    Args:
        backbone_model: a `Backbone`; it is not copied.
        backbone_out_layers: block indices, or a named set of them (`BackboneLayersSet` or its name).
        use_backbone_norm: apply the final norm to every block asked for.
        adapt_to_patch_size: what happens to images whose sides are no multiples of the patch; a member or its value.

    Attributes:
        backbone_out_indices: of the blocks asked for.
        embed_dims: widths of their outputs, in block order.
        patch_size_adapter: changes the size of images.

    Raises:
        ValueError: blocks that don't exist, or unknown names.
    """

    def __init__(
        self,
        backbone_model: nn.Module,
        backbone_out_layers: Sequence[int] | BackboneLayersSet | str,
        use_backbone_norm: bool = False,
        adapt_to_patch_size: PatchSizeAdaptationStrategy | str = PatchSizeAdaptationStrategy.CENTER_PADDING,
    ) -> None:
        super().__init__()
        self.final_norm = use_backbone_norm
        self.backbone = backbone_model.eval().requires_grad_(False)
        n_blocks = getattr(backbone_model, "n_blocks", 1)
        in_block_order = layer_indices(backbone_out_layers, n_blocks)
        self.backbone_out_indices = (
            in_block_order
            if isinstance(backbone_out_layers, str | BackboneLayersSet)
            else [int(i) for i in backbone_out_layers]
        )
        widths = getattr(backbone_model, "embed_dims", None)
        self.embed_dims: list[int] = [
            cast(int, backbone_model.embed_dim) if widths is None else widths[i] for i in in_block_order
        ]
        # ConvNeXt has no patches of one size: its stem decides what fits.
        multiple = getattr(backbone_model, "input_pad_size", None) or backbone_model.patch_size
        self.patch_size_adapter = patch_size_adapter(adapt_to_patch_size, cast(int, multiple))

    def train(self, mode: bool = True) -> "DinoVisionTransformerWrapper":
        """The backbone stays in evaluation mode whatever is asked for."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> list[LayerOutput]:
        """Features of normalised images `[B, 3, H, W]`: for each block, patch features and class token."""
        outputs = cast(Backbone, self.backbone).get_intermediate_layers(
            self.patch_size_adapter(x),
            n=self.backbone_out_indices,
            reshape=True,
            return_class_token=True,
            norm=self.final_norm,
        )
        return [(patches, class_token) for patches, class_token in outputs]
