"""From configurations and weight files to dino.txt models that are ready to train or to use."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dinov3.checkpointer import register_dont_save_hooks
from dinov3.checkpointer.files import is_dcp
from dinov3.checkpointer.initialize import init_fsdp_model_from_checkpoint, shard_like
from dinov3.checkpointer.weights import load_weights, read_state_dict, read_weights
from dinov3.data.transforms import make_classification_eval_transform, make_classification_train_transform
from dinov3.eval.text.ac_comp_parallelize import ac_compile_parallelize_and_init
from dinov3.eval.text.config import TextModelConfig, load_model_config
from dinov3.eval.text.dinotxt_model import DINOTxt, DINOTxtConfig
from dinov3.eval.text.text_transformer import TextTransformer
from dinov3.eval.text.tokenizer import Tokenizer, get_tokenizer
from dinov3.hub.registry import BACKBONES

logger = logging.getLogger("dinov3")

_NOT_THE_BACKBONE = ("dino_loss", "ibot_patch_loss", "dino_head", "ibot_head")
_VISION_BACKBONE, _TEXT_BACKBONE = "visual_model.backbone.", "text_model.backbone."


def build_model_and_tokenizer(
    model_config: DINOTxtConfig,
    use_fsdp: bool = True,
    do_compile: bool = False,
    use_ac: bool = True,
    use_full_ac: bool = False,
    use_cuda_graphs: bool = False,
    param_dtype_str: str = "bf16",
    reduce_dtype_str: str = "fp32",
) -> tuple[DINOTxt, Any, Tokenizer]:
    """A model to train, the transform of its images, and its tokenizer.

    Weights of the vision backbone, and of the text backbone if there are any, are loaded; all others are random.
    Backbones that are frozen are left out of state dicts. A collective of the world.

    Args:
        model_config: the model; `vision_backbone_config` may be the name of a hub backbone as well (`dinov3_vits16`).
        use_fsdp, do_compile, use_ac, use_full_ac, use_cuda_graphs, param_dtype_str, reduce_dtype_str: see
            `ac_compile_parallelize_and_init`.

    Raises:
        ValueError: a frozen backbone without weights, weights that don't fit, or a vocabulary larger than the model's.
        FileNotFoundError: no such weights, configuration or vocabulary.
    """
    tokenizer = get_tokenizer(model_config.text_vocab_path_or_url)
    for which, frozen, weights in _backbone_settings(model_config):
        if frozen and not weights:
            raise ValueError(
                f"the {which} backbone is frozen and would stay random: set {which}_backbone_pretrained_weights, or "
                f"{which}_model_freeze_backbone=false"
            )
    model = compile_parallelize_and_init(
        model_config,
        use_fsdp=use_fsdp,
        do_compile=do_compile,
        use_ac=use_ac,
        use_full_ac=use_full_ac,
        use_cuda_graphs=use_cuda_graphs,
        param_dtype_str=param_dtype_str,
        reduce_dtype_str=reduce_dtype_str,
    )
    _check_vocabulary(model, tokenizer)
    for tower in (model.visual_model, model.text_model):
        if tower.freeze_backbone:
            register_dont_save_hooks(tower.backbone, list(tower.backbone.state_dict()))
    transform = make_classification_train_transform(crop_size=model_config.vision_model_train_img_size)
    return model.train(), transform, tokenizer


def build_model_for_eval(
    model_config: DINOTxtConfig,
    pretrained_weights: str | os.PathLike[str],
    use_fsdp: bool = True,
    do_compile: bool = True,
    use_cuda_graphs: bool = False,
    param_dtype_str: str = "bf16",
    reduce_dtype_str: str = "fp32",
) -> tuple[DINOTxt, Any, Tokenizer]:
    """A trained model in evaluation mode, the transform of its images, and its tokenizer. A collective of the world.

    Args:
        model_config: the model.
        pretrained_weights: an export of a training (`sharded_model_checkpoint`), or a file of a whole state dict. What
            it lacks of backbones comes from the weights that `model_config` names.
        use_fsdp, do_compile, use_cuda_graphs, param_dtype_str, reduce_dtype_str: see
            `ac_compile_parallelize_and_init`.

    Raises:
        ValueError: weights that don't fit, or lack a backbone that the configuration has no weights for.
        FileNotFoundError: no such weights, configuration or vocabulary.
    """
    tokenizer = get_tokenizer(model_config.text_vocab_path_or_url)
    model = compile_parallelize_and_init(
        model_config,
        use_fsdp=use_fsdp,
        do_compile=do_compile,
        use_ac=False,
        use_cuda_graphs=use_cuda_graphs,
        param_dtype_str=param_dtype_str,
        reduce_dtype_str=reduce_dtype_str,
    )
    _load_trained(model, pretrained_weights, model_config)
    _check_vocabulary(model, tokenizer)
    return model.eval(), make_crop_transform(model_config.vision_model_train_img_size), tokenizer


def make_crop_transform(crop_size: int) -> Any:
    """The transform of images at evaluation: resized to a shorter side of 256/224 of the crop, then the centre of it.

    Args:
        crop_size: [pixels].
    """
    return make_classification_eval_transform(resize_size=int(256 * crop_size / 224), crop_size=crop_size)


def compile_parallelize_and_init(model_config: DINOTxtConfig, **options: Any) -> DINOTxt:
    """A model on its device: random, then with the weights of the backbones that the configuration names.

    Args:
        model_config: the model.
        options: of `ac_compile_parallelize_and_init`.
    """

    def build() -> DINOTxt:
        with torch.device("meta"):
            return DINOTxt(model_config, vision_backbone=_hub_backbone(model_config.vision_backbone_config))

    model = build()
    ac_compile_parallelize_and_init(model, build, **options)
    towers: dict[str, Any] = {"vision": model.visual_model, "text": model.text_model}
    for which, _, weights in _backbone_settings(model_config):
        if weights:
            load_backbone_checkpoint(towers[which].backbone, weights)
    return model


def load_backbone_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    mesh: DeviceMesh | None = None,
    skip_prefixes: Iterable[str] = _NOT_THE_BACKBONE,
) -> None:
    """Load a backbone, sharded or not, all of it.

    Args:
        model: a vision or a text backbone, on its device.
        path: a file or folder that `read_weights` knows; for a text backbone a file of its own state dict, or of a
            dino.txt model.
        mesh: the processes that a checkpoint folder is read by; None: the world. How the model is sharded is read off
            the model.
        skip_prefixes: keys that begin so belong to other parts.

    Raises:
        FileNotFoundError: nothing there.
        ValueError, RuntimeError: keys or shapes differ; the message says which.
    """
    is_text = isinstance(model, TextTransformer)
    if not is_text and Path(path).is_dir() and is_dcp(Path(path)):
        group = None if mesh is None else mesh.get_group()
        init_fsdp_model_from_checkpoint(nn.ModuleDict({"backbone": model}), path, process_group=group)
        return
    if is_text:
        state = _part_of(read_state_dict(path), (_TEXT_BACKBONE, "backbone."))
    else:
        state = {_renamed(key): value for key, value in read_weights(path, like=model).items()}
    skipped = tuple(skip_prefixes)
    _load(model, {key: value for key, value in state.items() if not key.startswith(skipped)}, path)


def rename_register_token(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose `register_tokens`, as older files have it, is called `storage_tokens`."""
    return {_renamed(key): value for key, value in state_dict.items()}


def _renamed(key: str) -> str:
    *path, last = key.split(".")
    return ".".join([*path, "storage_tokens" if last == "register_tokens" else last])


def load_for_use(config: TextModelConfig) -> tuple[DINOTxt, Any, Tokenizer]:
    """The model that an evaluation names, in evaluation mode, its transform maker, and its tokenizer.

    The second is called with `resize_size=` and `crop_size=`.

    Raises:
        ValueError: neither or both of `hub` and `config_file`, or what the hub or `build_model_for_eval` refuse.
    """
    if (config.hub is None) == (config.config_file is None):
        raise ValueError(
            "give the model either as model.hub=<name> or as model.config_file=<clip_model_config.yaml> with "
            f"model.weights=<sharded_model_checkpoint>; got {config}"
        )
    if config.hub is not None:
        return _load_hub(config)
    if not config.weights:
        raise ValueError("model.config_file needs model.weights, an export of the training")
    model_config = load_model_config(str(config.config_file))
    model_config.text_vocab_path_or_url = config.vocabulary or model_config.text_vocab_path_or_url
    if config.backbone_weights:
        model_config.vision_backbone_pretrained_weights = config.backbone_weights
    model, _, tokenizer = build_model_for_eval(model_config, config.weights, use_fsdp=False, do_compile=False)
    return model, make_classification_eval_transform, tokenizer


def _load_hub(config: TextModelConfig) -> tuple[DINOTxt, Any, Tokenizer]:
    from functools import partial

    from dinov3.hub import dinotxt
    from dinov3.utils.device import default_device

    entries = [name for name in dinotxt.__all__ if name.startswith("dinov3_")]
    if config.hub not in entries:
        raise ValueError(f"model.hub={config.hub!r} is no dino.txt model of the hub; known: {', '.join(entries)}")
    given = {
        "weights": config.weights,
        "backbone_weights": config.backbone_weights,
        "bpe_path_or_url": config.vocabulary,
    }
    model, tokenizer = getattr(dinotxt, config.hub)(**{key: value for key, value in given.items() if value})
    mean, std = model.normalization
    transform = partial(make_classification_eval_transform, mean=mean, std=std)
    return model.to(default_device()).eval(), transform, tokenizer


def _backbone_settings(config: DINOTxtConfig) -> list[tuple[str, bool, str | None]]:
    """(name, frozen, weights) of both backbones."""
    return [
        ("vision", config.vision_model_freeze_backbone, config.vision_backbone_pretrained_weights),
        ("text", config.text_model_freeze_backbone, config.text_backbone_pretrained_weights),
    ]


def _hub_backbone(name: str | None) -> nn.Module | None:
    """A backbone that the hub names; None if it is no such name (but that of a file)."""
    if name is None or name not in BACKBONES:
        return None
    entry = BACKBONES[name]
    return entry.build(**entry.options)


def _check_vocabulary(model: DINOTxt, tokenizer: Tokenizer) -> None:
    size = getattr(model.text_model.backbone, "vocab_size", None)
    if size is not None and tokenizer.end_token >= size:
        raise ValueError(
            f"the tokenizer has ids up to {tokenizer.end_token}, the text backbone embeds {size}: "
            f"set vocab_size={tokenizer.end_token + 1} or use the vocabulary that it was made for"
        )


def _load_trained(model: DINOTxt, path: str | os.PathLike[str], config: DINOTxtConfig) -> None:
    """All of the model but backbones that the file doesn't hold and that are loaded already."""
    state = read_state_dict(path)
    loaded = [
        prefix
        for prefix, weights in (
            (_VISION_BACKBONE, config.vision_backbone_pretrained_weights),
            (_TEXT_BACKBONE, config.text_backbone_pretrained_weights),
        )
        if weights and not _holds(state, prefix)
    ]
    for which, prefix in (("vision", _VISION_BACKBONE), ("text", _TEXT_BACKBONE)):
        if prefix not in loaded and not _holds(state, prefix):
            raise ValueError(
                f"{os.fspath(path)} has no {which} backbone, and {which}_backbone_pretrained_weights is not set: the "
                "model would be random in part"
            )
    _load(model, state, path, allow_missing=loaded)


def _holds(state: dict[str, Tensor], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in state)


def _part_of(state: dict[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The entries below the first prefix that there is, without it; all of them if there is none."""
    for prefix in prefixes:
        if _holds(state, prefix):
            return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state


def _load(
    model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike[str], allow_missing: Iterable[str] = ()
) -> None:
    own = model.state_dict()
    shards = {key: shard_like(value, own[key]) if key in own else value for key, value in state.items()}
    try:
        report = load_weights(model, shards, allow_missing=allow_missing)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error
    logger.info("loaded %s: %s", os.fspath(path), report)
