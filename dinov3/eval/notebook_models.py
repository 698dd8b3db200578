"""Whole models for the notebooks: the released ones with your weights, else tiny random ones of the same form."""

import gzip
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dinov3.hub.registry import NORMALIZATIONS, Normalization, Weights
from dinov3.models.vision_transformer import DinoVisionTransformer, vit_nano
from dinov3.utils.device import default_device

if TYPE_CHECKING:
    from dinov3.eval.detection.models.processor import DetectorWithProcessor
    from dinov3.eval.text.dinotxt_model import DINOTxt
    from dinov3.eval.text.tokenizer import Tokenizer

logger = logging.getLogger("dinov3")

HEAD_VARIABLE, WEIGHTS_VARIABLE = "DINOV3_HEAD_WEIGHTS", "DINOV3_WEIGHTS"


def notebook_canopy_model() -> tuple[nn.Module, Normalization]:
    """The model of canopy heights, and mean and standard deviation of its images.

    `DINOV3_HEAD_WEIGHTS` and `DINOV3_WEIGHTS` are the files of `dinov3_vitl16_chmv2`.
    """
    from dinov3.hub.depthers import CHMV2_NORMALIZATION, dinov3_vitl16_chmv2

    if (files := _files("dinov3_vitl16_chmv2")) is not None:
        return dinov3_vitl16_chmv2(weights=files[0], backbone_weights=files[1]).to(
            default_device()
        ), CHMV2_NORMALIZATION
    from dinov3.eval.depth.config import DecoderConfig
    from dinov3.eval.depth.models import make_depther_from_config

    config = DecoderConfig(
        min_depth=0.001,
        max_depth=96.0,
        bins_strategy="chmv2_mixlog",
        norm_strategy="chmv2_mixlog",
        type="dpt",
        n_output_channels=32,
        backbone_out_layers=[0, 1, 2, 3],
        use_backbone_norm=True,
        use_batchnorm=False,
        use_cls_token=True,
        head_kwargs={"channels": 32, "post_process_channels": [32] * 4, "n_hidden_channels": 32, "use_bias": True},
    )
    with _seeded():
        return make_depther_from_config(_tiny_backbone(), config).eval().to(default_device()), CHMV2_NORMALIZATION


def notebook_detector() -> "DetectorWithProcessor":
    """The detector. `DINOV3_HEAD_WEIGHTS` and `DINOV3_WEIGHTS` are the files of `dinov3_vit7b16_de`."""
    if (files := _files("dinov3_vit7b16_de")) is not None:
        from dinov3.hub.detectors import dinov3_vit7b16_de

        return dinov3_vit7b16_de(weights=files[0], backbone_weights=files[1]).to(default_device())
    from dinov3.eval.detection.config import DetectionHeadConfig
    from dinov3.eval.detection.models.detr import PostProcess, build_model
    from dinov3.eval.detection.models.processor import DetectorWithProcessor, one_to_one

    config = DetectionHeadConfig(
        hidden_dim=64, dim_feedforward=64, dec_layers=2, num_encoder_layers=1, num_queries_one2one=20, topk=20
    )
    with _seeded():
        detector = build_model(_tiny_backbone(), config)
    return (
        DetectorWithProcessor(one_to_one(detector), PostProcess(config.topk, config.reparam))
        .eval()
        .to(default_device())
    )


def notebook_dinotxt() -> tuple["DINOTxt", "Tokenizer"]:
    """dino.txt and its tokenizer.

    `DINOV3_HEAD_WEIGHTS` and `DINOV3_WEIGHTS` are the files of `dinov3_vitl16_dinotxt_tet1280d20h24l`. The tiny one
    reads texts byte by byte, without a vocabulary.
    """
    if (files := _files("dinov3_vitl16_dinotxt_tet1280d20h24l")) is not None:
        from dinov3.hub.dinotxt import dinov3_vitl16_dinotxt_tet1280d20h24l

        model, tokenizer = dinov3_vitl16_dinotxt_tet1280d20h24l(weights=files[0], backbone_weights=files[1])
        return model.to(default_device()), tokenizer
    from dinov3.eval.text.dinotxt_model import DINOTxt, DINOTxtConfig
    from dinov3.eval.text.text_tower import build_text_backbone
    from dinov3.eval.text.tokenizer import get_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder, "bytes.txt.gz")
        vocabulary.write_bytes(gzip.compress(b"#version: bytes\n", mtime=0))
        tokenizer = get_tokenizer(vocabulary)
    text_backbone: dict[str, Any] = {
        "context_length": 77,
        "vocab_size": 514,  # bytes, bytes that end a word, start and end
        "dim": 64,
        "num_heads": 2,
        "num_layers": 2,
        "ffn_ratio": 4.0,
        "is_causal": True,
    }
    config = DINOTxtConfig(
        embed_dim=256,
        vision_model_use_class_token=True,
        vision_model_use_patch_tokens=True,
        vision_model_num_head_blocks=1,
        text_model_tokens_pooler_type="argmax",
        text_model_use_linear_projection=True,
    )
    with _seeded():
        model = DINOTxt(config, _tiny_backbone(), build_text_backbone(text_backbone))
        model.visual_model.head.init_weights()
        model.text_model.init_weights()
    model.normalization = NORMALIZATIONS[Weights.LVD1689M]  # type: ignore[assignment]
    return model.eval().to(default_device()), tokenizer


def _files(entry: str) -> tuple[str, str] | None:
    """The files of head and backbone that the environment names; None: neither.

    Raises:
        ValueError: one of them alone.
    """
    head, backbone = os.environ.get(HEAD_VARIABLE), os.environ.get(WEIGHTS_VARIABLE)
    if head and backbone:
        return head, backbone
    if head or backbone:
        raise ValueError(f"{entry} needs two files: set both {HEAD_VARIABLE} and {WEIGHTS_VARIABLE}")
    logger.warning(
        "RANDOM WEIGHTS: a tiny untrained network shows that everything runs, and nothing more. Set "
        f"{HEAD_VARIABLE} and {WEIGHTS_VARIABLE} to the files of {entry} for real results."
    )
    return None


@contextmanager
def _seeded() -> Iterator[None]:
    """Random weights that are the same each time, and leave the caller's draws alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _tiny_backbone() -> DinoVisionTransformer:
    model = vit_nano(patch_size=16, n_storage_tokens=4, pos_embed_rope_dtype="fp32")
    model.init_weights()
    return model.eval()
