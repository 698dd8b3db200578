"""dino.txt of the hub: a ViT-L/16 aligned with text.

model, tokenizer = torch.hub.load("facebookresearch/dinov3", "dinov3_vitl16_dinotxt_tet1280d20h24l")
features = model.encode_text(tokenizer.tokenize(["a photo of a cat"]), normalize=True)
"""

import os
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from dinov3.checkpointer.weights import load_weights, read_state_dict
from dinov3.hub.loading import NoInit, WeightsLike, load_backbone
from dinov3.hub.registry import BASE_URL, NORMALIZATIONS, Weights
from dinov3.hub.transforms import make_transform

if TYPE_CHECKING:
    from dinov3.eval.text.dinotxt_model import DINOTxt
    from dinov3.eval.text.tokenizer import Tokenizer

__all__ = ["DINOTxtWeights", "dinov3_vitl16_dinotxt_tet1280d20h24l"]

_BACKBONE = "dinov3_vitl16"
_VOCABULARY = f"{BASE_URL}/thirdparty/bpe_simple_vocab_16e6.txt.gz"


class DINOTxtWeights(Enum):
    """Image-text data that dino.txt was trained on."""

    LVTD2300M = "LVTD2300M"


_FILES = {
    DINOTxtWeights.LVTD2300M: f"{BASE_URL}/{_BACKBONE}/{_BACKBONE}_dinotxt_vision_head_and_text_encoder-a442d8f5.pth",
}

# The released model, as `DINOTxtConfig` and as options of the text transformer.
_MODEL: dict[str, Any] = {
    "embed_dim": 2048,  # two halves, for the class token and the pooled patch tokens
    "vision_model_train_img_size": 224,
    "vision_model_use_class_token": True,
    "vision_model_use_patch_tokens": True,
    "vision_model_num_head_blocks": 2,
    "vision_model_head_blocks_drop_path": 0.3,
    "text_model_tokens_pooler_type": "argmax",
    "text_model_use_linear_projection": True,
}
_TEXT_BACKBONE: dict[str, Any] = {
    "context_length": 77,
    "vocab_size": 49408,
    "dim": 1280,
    "num_heads": 20,
    "num_layers": 24,
    "ffn_ratio": 4.0,
    "is_causal": True,
}


def dinov3_vitl16_dinotxt_tet1280d20h24l(
    *,
    pretrained: bool = True,
    weights: DINOTxtWeights | str | os.PathLike[str] = DINOTxtWeights.LVTD2300M,
    backbone_weights: WeightsLike = Weights.LVD1689M,
    bpe_path_or_url: str | os.PathLike[str] = _VOCABULARY,
    check_hash: bool = False,
) -> tuple["DINOTxt", "Tokenizer"]:
    """dino.txt on a frozen ViT-L/16: 24 text blocks, 1280 wide, 20 heads; 867 M parameters.

    Args:
        pretrained: False: random weights.
        weights: of the vision head and the text tower: a member of `DINOTxtWeights` or its name (fetched from Meta,
            whose server wants a signed address), a path, an address, or an export of a training.
        backbone_weights: of the ViT-L/16; see `load_backbone`.
        bpe_path_or_url: vocabulary of the tokenizer. By default a copy in the cache of torch.hub or inside an installed
            `open_clip` is used, before Meta's address is.
        check_hash: verify the SHA-256 digits in the files' names, also of cached and local files.

    Returns:
        The model, in evaluation mode if pretrained, and its tokenizer. `model.make_transform(resize_size=256)` gives
        the transform of its images.

    Raises:
        FileNotFoundError, DownloadError: no weights or no vocabulary; the message says where they can be had.
        ImportError: the tokenizer's packages are missing.
        ValueError: unknown weights, or a file that doesn't fit; the message says which of the two it is.
    """
    from dinov3.eval.text.tokenizer import get_tokenizer

    source = _source(weights)
    tokenizer = get_tokenizer(bpe_path_or_url)  # first: it takes no time, and may fail
    backbone = load_backbone(_BACKBONE, pretrained=pretrained, weights=backbone_weights, check_hash=check_hash)
    model = _build(backbone, pretrained=pretrained)
    if pretrained:
        _load(model, source, check_hash)
        model.eval()
    normalization = getattr(backbone, "normalization", NORMALIZATIONS[Weights.LVD1689M])
    model.normalization = normalization  # type: ignore[assignment]
    model.make_transform = partial(make_transform, normalization=normalization)  # type: ignore[assignment]
    return model, tokenizer


def _source(weights: Any) -> str | os.PathLike[str]:
    """Where the weights of head and text tower are."""
    member = DINOTxtWeights.__members__.get(weights.upper()) if isinstance(weights, str) else weights
    if isinstance(member, DINOTxtWeights):
        return _FILES[member]
    known = ", ".join(DINOTxtWeights.__members__)
    if not isinstance(weights, str | os.PathLike):
        raise ValueError(f"got {weights!r} for weights, expected one of {known}, a path or an address")
    if isinstance(weights, str) and weights.isidentifier() and not os.path.exists(weights):
        raise ValueError(f"unknown weights {weights!r}: expected one of {known}, a path or an address")
    return weights


def _build(backbone: nn.Module, *, pretrained: bool) -> "DINOTxt":
    """The model around a backbone, the rest of it random, or undefined if it will be loaded."""
    from dinov3.eval.text.dinotxt_model import DINOTxt, DINOTxtConfig
    from dinov3.eval.text.text_tower import build_text_backbone

    config = DINOTxtConfig(**_MODEL)
    if pretrained:
        with NoInit():
            return DINOTxt(config, vision_backbone=backbone, text_backbone=build_text_backbone(_TEXT_BACKBONE))
    model = DINOTxt(config, vision_backbone=backbone, text_backbone=build_text_backbone(_TEXT_BACKBONE))
    model.visual_model.head.init_weights()
    model.text_model.init_weights()
    return model


def _load(model: "DINOTxt", source: str | os.PathLike[str], check_hash: bool) -> None:
    """Load all but the vision backbone; the file may hold one, which `backbone_weights` decides on."""
    state = read_state_dict(source, check_hash=check_hash)
    backbone = "visual_model.backbone."
    state = {key: value for key, value in state.items() if not key.startswith(backbone)}
    loaded = {key: value for key, value in model.state_dict().items() if key.startswith(backbone)}
    try:
        load_weights(model, loaded | state)
    except ValueError as error:
        hint = ""
        if not any(key.startswith(("visual_model.", "text_model.")) for key in state):
            hint = " It isn't of dino.txt: is it a backbone? Then pass it as backbone_weights="
        raise ValueError(f"dino.txt, weights={os.fspath(source)}: {error}.{hint}") from error
