"""Segmentation models: a frozen backbone with a head.

`heads/`: the linear head and Mask2Former; `backbone/`: the adapter that gives Mask2Former its scales; `utils/`: parts
of both. Pure model code: no data, no training.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dinov3.checkpointer.heads import HeadFile
from dinov3.checkpointer.weights import load_weights
from dinov3.eval.segmentation.models.backbone.dinov3_adapter import DINOv3_Adapter
from dinov3.eval.segmentation.models.heads.linear_head import LinearHead
from dinov3.eval.segmentation.models.heads.mask2former_head import Mask2FormerHead
from dinov3.models.backbone import Backbone
from dinov3.models.features import BackboneLayersSet, frozen_features, layer_indices, resize_to_patches
from dinov3.utils.device import default_device
from dinov3.utils.dtype import as_torch_dtype, autocast_to

__all__ = [
    "BackboneLayersSet",
    "FeatureDecoder",
    "FrozenLayers",
    "build_from_head",
    "build_segmentation_decoder",
    "head_state",
    "load_head_state",
]


class FrozenLayers(nn.Module):
    """A frozen backbone as the first part of a decoder: maps of some of its layers.

    Args:
        feature_model: the backbone; its parameters no longer require gradients, and it stays in evaluation mode.
        indices: of the layers.
        autocast_dtype: see `frozen_features`.
        use_cls_token: give pairs of map and class token.
        use_norm: apply the backbone's final norm.
    """

    def __init__(
        self,
        feature_model: nn.Module,
        indices: Sequence[int],
        *,
        autocast_dtype: torch.dtype = torch.float32,
        use_cls_token: bool = False,
        use_norm: bool = True,
    ) -> None:
        super().__init__()
        self.feature_model = feature_model.requires_grad_(False)
        self.indices = list(indices)
        self.autocast_dtype = autocast_dtype
        self.use_cls_token = use_cls_token
        self.use_norm = use_norm
        self.image_multiple = cast(Backbone, feature_model).stride
        self.eval()

    def train(self, mode: bool = True) -> "FrozenLayers":
        """The backbone stays in evaluation mode whatever is asked for."""
        super().train(mode)
        self.feature_model.eval()
        return self

    def forward(self, images: Tensor) -> list[Any]:
        """Maps `[B, D, h, w]` of each layer (with `use_cls_token` pairs with `[B, D]`) of images `[B, 3, H, W]`."""
        features = frozen_features(
            self.feature_model,
            images,
            self.indices,
            norm=self.use_norm,
            autocast_dtype=self.autocast_dtype,
        )
        return [(layer.map, layer.class_token) if self.use_cls_token else layer.map for layer in features.layers]


class FeatureDecoder(nn.Module):
    """A segmentation model: a part that makes features of images, and a head.

    Images whose sides are no multiples of what the first part needs (its `image_multiple`) are enlarged to the next
    ones, so that every pixel is seen and predictions lie where the pixels are.

    Args:
        segmentation_model: the two parts.
        autocast_ctx: gives the context that both run in.
    """

    def __init__(
        self, segmentation_model: nn.ModuleList, autocast_ctx: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        super().__init__()
        self.segmentation_model = segmentation_model
        self.autocast_ctx = autocast_ctx

    def forward(self, images: Tensor) -> Any:
        """What the head returns for images `[B, 3, H, W]`, for training."""
        with self.autocast_ctx():
            return self.segmentation_model[1](self._features(images))

    @torch.inference_mode()
    def predict(self, images: Tensor, rescale_to: Sequence[int] = (512, 512)) -> Any:
        """What the head predicts for images `[B, 3, H, W]`, at (height, width) `rescale_to`, without gradients."""
        return self._predict(images, rescale_to)

    def graph_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """What an exported graph gives: the prediction at the size of the images.

        `logits` `[B, K, H, W]` of a linear head; `pred_logits` `[B, Q, K + 1]` and `pred_masks` `[B, Q, H, W]` of
        Mask2Former.
        """
        found = self._predict(images, images.shape[-2:])
        if isinstance(found, Tensor):
            return {"logits": found}
        return {name: found[name] for name in ("pred_logits", "pred_masks")}

    def _predict(self, images: Tensor, size: Sequence[int]) -> Any:
        with self.autocast_ctx():
            head = cast(Any, self.segmentation_model[1])
            return head.predict(self._features(images), rescale_to=size)

    def _features(self, images: Tensor) -> Any:
        extractor = self.segmentation_model[0]
        return extractor(resize_to_patches(images, int(getattr(extractor, "image_multiple", 1))))


def build_segmentation_decoder(
    backbone_model: nn.Module,
    backbone_out_layers: BackboneLayersSet = BackboneLayersSet.FOUR_EVEN_INTERVALS,
    decoder_type: Literal["linear", "m2f"] = "linear",
    hidden_dim: int = 2048,
    num_classes: int = 150,
    dropout: float = 0.1,
    autocast_dtype: torch.dtype = torch.float32,
    *,
    use_batchnorm: bool = True,
    use_cls_token: bool = False,
    use_backbone_norm: bool = True,
) -> FeatureDecoder:
    """A frozen backbone with a new head.

    Args:
        backbone_model: a `Backbone`; frozen from now on.
        backbone_out_layers: layers whose features the head gets.
        decoder_type: `linear`, or `m2f` for Mask2Former behind a ViT-Adapter.
        hidden_dim: width of the Mask2Former head.
        num_classes: number of classes K.
        dropout: of the linear head.
        autocast_dtype: to compute in on accelerators; float32: no autocast.
        use_batchnorm, use_cls_token: of the linear head.
        use_backbone_norm: apply the backbone's final norm to every layer.

    Raises:
        ValueError: unknown decoder type, or a backbone that the head can't stand on.
    """
    indices = _get_backbone_out_indices(backbone_model, backbone_out_layers)
    parts: list[nn.Module]
    if decoder_type == "linear":
        dims = [cast(Backbone, backbone_model).embed_dims[i] for i in indices]
        parts = [
            FrozenLayers(
                backbone_model,
                indices,
                autocast_dtype=autocast_dtype,
                use_cls_token=use_cls_token,
                use_norm=use_backbone_norm,
            ),
            LinearHead(dims, num_classes, use_batchnorm, use_cls_token, dropout),
        ]
    elif decoder_type == "m2f":
        adapter = DINOv3_Adapter(backbone_model, indices, use_backbone_norm=use_backbone_norm)
        dim, patch = cast(Backbone, backbone_model).embed_dim, int(cast(Any, backbone_model.patch_size))
        # The sizes are of no consequence; the order is, and the strides, all the same, leave it as it is.
        sides = {"1": 4 * patch, "2": 2 * patch, "3": patch, "4": patch // 2}
        input_shape = {name: [dim, side, side, 4] for name, side in sides.items()}
        head = Mask2FormerHead(input_shape, hidden_dim=hidden_dim, num_classes=num_classes, ignore_value=255)
        parts = [adapter.eval(), head]
    else:
        raise ValueError(f"decoder_type is 'linear' or 'm2f', got {decoder_type!r}")
    return FeatureDecoder(nn.ModuleList(parts), _autocast_ctx(autocast_dtype))


# Where the frozen backbone is in decoders with a linear head, and with Mask2Former.
_BACKBONES = ("segmentation_model.0.feature_model", "segmentation_model.0.backbone")


def head_state(decoder: nn.Module) -> dict[str, Tensor]:
    """The tensors of a decoder that are not its backbone's: what is trained, and released, as a head."""
    return {key: value for key, value in decoder.state_dict().items() if not _is_of_backbone(key)}


def load_head_state(decoder: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a head's tensors, and the backbone's if they are there.

    Raises:
        ValueError: a tensor of the head is missing, or one is unknown or of another shape; the message names them.
    """
    backbone = {key: value for key, value in decoder.state_dict().items() if _is_of_backbone(key)}
    load_weights(decoder, {**backbone, **state})


def _is_of_backbone(key: str) -> bool:
    return key.startswith(tuple(f"{name}." for name in _BACKBONES))


def build_from_head(backbone: nn.Module, head_file: HeadFile) -> FeatureDecoder:
    """The segmentation model of a head file, in evaluation mode, on the backbone's device.

    Raises:
        ValueError: the head doesn't fit the backbone.
    """
    options = dict(head_file.config["decoder"])
    options["backbone_out_layers"] = BackboneLayersSet(options["backbone_out_layers"])
    dtype = as_torch_dtype(options.pop("autocast_dtype"))
    decoder = build_segmentation_decoder(backbone, autocast_dtype=dtype, **options)
    load_head_state(decoder, head_file.head)
    device = next((parameter.device for parameter in backbone.parameters()), torch.device("cpu"))
    return decoder.to(device).eval()


def _get_backbone_out_indices(
    model: nn.Module, backbone_out_layers: BackboneLayersSet = BackboneLayersSet.FOUR_EVEN_INTERVALS
) -> list[int]:
    """Indices of the layers of a set; a model without `n_blocks` has one layer."""
    return layer_indices(backbone_out_layers, int(getattr(model, "n_blocks", 1)))


def _autocast_ctx(dtype: torch.dtype) -> Callable[[], AbstractContextManager[Any]]:
    """Autocast on the accelerator of this machine; models on a CPU always compute in float32."""
    return partial(autocast_to, default_device().type, dtype)
