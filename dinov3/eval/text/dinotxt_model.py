"""The model of dino.txt: a vision and a text tower whose features can be compared.

Source: Jose et al., "DINOv2 Meets Text: A Unified Framework for Image- and Pixel-Level Vision-Language Alignment"
(2024), section 3; Siméoni et al., "DINOv3" (2025), section 5.3.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.eval.text.text_tower import TextTower, build_text_backbone, build_text_model
from dinov3.eval.text.tokenizer import CONTEXT_LENGTH
from dinov3.eval.text.vision_tower import VisionFeatures, VisionTower, build_vision_model


@dataclass
class DINOTxtConfig:
    """What a dino.txt model is made of."""

    embed_dim: int
    """Width of image and text features."""
    vision_backbone_config: str | None = None
    """YAML of a training, whose teacher is the vision backbone."""
    text_backbone_config: str | None = None
    """YAML of the text transformer (`configs/text_backbone.yaml`)."""
    vision_backbone_pretrained_weights: str | None = None
    """File or checkpoint folder."""
    text_backbone_pretrained_weights: str | None = None
    """File or checkpoint folder."""
    vision_model_freeze_backbone: bool = True
    vision_model_train_img_size: int = 224
    """Side of the training crops in pixels."""
    vision_model_use_class_token: bool = True
    """The class token is a part of the image features."""
    vision_model_use_patch_tokens: bool = False
    """The pooled patch tokens are a part of the image features, after the class token."""
    vision_model_num_head_blocks: int = 0
    vision_model_head_blocks_drop_path: float = 0.3
    vision_model_use_linear_projection: bool = False
    """Project even if the widths are equal."""
    vision_model_patch_tokens_pooler_type: str = "mean"
    """mean or max."""
    vision_model_patch_token_layer: int = 1
    """Layer of the patch tokens, counted from the end."""
    text_model_freeze_backbone: bool = False
    text_model_num_head_blocks: int = 0
    text_model_head_blocks_is_causal: bool = False
    text_model_head_blocks_drop_prob: float = 0.0
    text_model_tokens_pooler_type: str = "first"
    """first, last or argmax."""
    text_model_use_linear_projection: bool = False
    """Project even if the widths are equal."""
    text_vocab_path_or_url: str | None = None
    """Vocabulary of the tokenizer; null: wherever it can be found, see `tokenizer.py`."""
    init_logit_scale: float = math.log(1 / 0.07)
    """Logarithm of the factor of similarities in the contrastive loss."""
    init_logit_bias: float | None = None
    """Accepted for old files; nothing reads it."""
    freeze_logit_scale: bool = False


class DINOTxtOutput(NamedTuple):
    """What the training compares.

    Attributes:
        image_features, text_features: L2-normalised `[B, embed_dim]`, float32.
        logit_scale: factor of similarities `[1]`, already exponentiated.
        patch_tokens: after the vision head `[B, P, D']`.
        backbone_patch_tokens: `[B, P, D]`.
    """

    image_features: Tensor
    text_features: Tensor
    logit_scale: Tensor
    patch_tokens: Tensor
    backbone_patch_tokens: Tensor


class DINOTxt(nn.Module):
    """Vision and text tower, and the scale of the similarities between them.

    With both class and patch tokens in the image features, the first half of a text's features is aligned to the class
    token and the second half to the pooled patch tokens; the latter can be compared with single patches.

    Args:
        model_config: a `DINOTxtConfig`, or anything with its attributes.
        vision_backbone, text_backbone: used as they are; None: built as the configuration says, with random weights.
        device: of what is built here.

    Raises:
        RuntimeError: a backbone is neither given nor configured.
        ValueError: values that don't fit each other; see `VisionTower` and `TextTower`.
    """

    def __init__(
        self,
        model_config: Any,
        vision_backbone: nn.Module | None = None,
        text_backbone: nn.Module | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        config = self.model_config = model_config
        with nullcontext() if device is None else torch.device(device):
            self.visual_model: VisionTower = build_vision_model(
                embed_dim=config.embed_dim,
                backbone=vision_backbone if vision_backbone is not None else _build_vision_backbone(config),
                freeze_backbone=config.vision_model_freeze_backbone,
                num_head_blocks=config.vision_model_num_head_blocks,
                blocks_drop_path=config.vision_model_head_blocks_drop_path,
                use_class_token=config.vision_model_use_class_token,
                use_patch_tokens=config.vision_model_use_patch_tokens,
                patch_token_layer=config.vision_model_patch_token_layer,
                patch_tokens_pooler_type=config.vision_model_patch_tokens_pooler_type,
                use_linear_projection=config.vision_model_use_linear_projection,
            )
            self.text_model: TextTower = build_text_model(
                embed_dim=config.embed_dim,
                backbone=text_backbone if text_backbone is not None else _build_text_backbone(config),
                freeze_backbone=config.text_model_freeze_backbone,
                num_head_blocks=config.text_model_num_head_blocks,
                head_blocks_is_causal=config.text_model_head_blocks_is_causal,
                head_blocks_drop_prob=config.text_model_head_blocks_drop_prob,
                tokens_pooler_type=config.text_model_tokens_pooler_type,
                use_linear_projection=config.text_model_use_linear_projection,
            )
            self.logit_scale = nn.Parameter(
                torch.full((1,), float(config.init_logit_scale)), requires_grad=not config.freeze_logit_scale
            )

    @property
    def context_length(self) -> int:
        """Tokens of the longest text; CLIP's 77 if the text backbone doesn't say."""
        return int(getattr(self.text_model.backbone, "context_length", CONTEXT_LENGTH))

    def init_weights(self) -> None:
        """Random weights, those of the backbones too, and the scale of the configuration."""
        self.visual_model.init_weights()
        self.text_model.init_weights()
        nn.init.constant_(self.logit_scale, self.model_config.init_logit_scale)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Features `[B, embed_dim]` of images `[B, 3, H, W]`."""
        return self.encode_image_with_patch_tokens(image, normalize)[0]

    def encode_image_with_patch_tokens(self, image: Tensor, normalize: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Features `[B, embed_dim]`, and the patch tokens after and before the head, which are never normalised."""
        found: VisionFeatures = self.visual_model(image)
        return _normalized(found.features, normalize), found.patch_tokens, found.backbone_patch_tokens

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Features `[B, embed_dim]` of token ids `[B, N]`."""
        return _normalized(self.text_model(text), normalize)

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosine similarities of all pairs: image by text `[B, T]`, and its transpose."""
        similarities = self.encode_image(image, normalize=True) @ self.encode_text(text, normalize=True).mT
        logits = self.logit_scale.exp() * similarities
        return logits, logits.mT

    def forward(self, image: Tensor, text: Tensor) -> DINOTxtOutput:
        """What the contrastive and the Gram loss compare, of images `[B, 3, H, W]` and token ids `[B, N]`."""
        image_features, patch_tokens, backbone_patch_tokens = self.encode_image_with_patch_tokens(image)
        text_features = self.encode_text(text)
        return DINOTxtOutput(
            # Not in bfloat16, whatever the towers compute in: similarities are multiplied by up to 100.
            F.normalize(image_features.float(), dim=-1),
            F.normalize(text_features.float(), dim=-1),
            self.logit_scale.exp(),
            patch_tokens,
            backbone_patch_tokens,
        )


def _normalized(features: Tensor, wanted: bool) -> Tensor:
    return F.normalize(features, dim=-1) if wanted else features


def _build_vision_backbone(config: Any) -> nn.Module:
    """The teacher of the training that the configuration names."""
    from dinov3.configs.config import load_teacher_config
    from dinov3.models.build import build_backbone

    path = _require(config, "vision_backbone_config", "vision_backbone")
    training = load_teacher_config(path)
    crop_size = training.crops.global_crops_size
    img_size = crop_size if isinstance(crop_size, int) else max(crop_size)
    return build_backbone(training.student, img_size=img_size)


def _build_text_backbone(config: Any) -> nn.Module:
    from dinov3.configs.config import load_mapping

    return build_text_backbone(load_mapping(_require(config, "text_backbone_config", "text_backbone")))


def _require(config: Any, key: str, argument: str) -> str:
    path = getattr(config, key, None)
    if not path:
        raise RuntimeError(f"DINOTxt needs a backbone: pass {argument}=, or set {key} to a YAML file")
    return cast(str, path)
