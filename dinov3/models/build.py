"""Backbones from a configuration, for training and for evaluation."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from dinov3.checkpointer.weights import load_weights, read_weights
from dinov3.layers.fp8_linear import convert_linears_to_fp8
from dinov3.models.backbone import Backbone
from dinov3.models.convnext import get_convnext_arch
from dinov3.models.foreign import ForeignBackbone
from dinov3.models.vision_transformer import get_vit_arch
from dinov3.utils.device import default_device

logger = logging.getLogger("dinov3")

# Options of the configuration that the vision transformer takes under the same name.
_VIT_OPTIONS = (
    "patch_size",
    "pos_embed_rope_base",
    "pos_embed_rope_min_period",
    "pos_embed_rope_max_period",
    "pos_embed_rope_normalize_coords",
    "pos_embed_rope_shift_coords",
    "pos_embed_rope_jitter_coords",
    "pos_embed_rope_rescale_coords",
    "qkv_bias",
    "norm_layer",
    "ffn_layer",
    "ffn_bias",
    "proj_bias",
    "n_storage_tokens",
    "mask_k_bias",
    "untie_cls_and_patch_norms",
    "untie_global_and_local_cls_norm",
)


def build_backbone(
    args: Any,
    *,
    img_size: int = 224,
    drop_path_rate: float = 0.0,
    device: torch.device | str | None = None,
) -> nn.Module:
    """The backbone that the `student` section of a configuration describes, without fp8.

    Args:
        args: the section; its values are read as attributes. `ffn_ratio` is fixed by the architecture.
        img_size: nominal side of the images [pixels].
        drop_path_rate: stochastic depth.
        device: of all parameters and buffers.

    Raises:
        NotImplementedError: unknown `args.arch`.
        ValueError: unknown model of timm or torchvision.
    """
    in_chans = getattr(args, "in_chans", 3)
    if ":" in args.arch:
        return ForeignBackbone.from_name(args.arch, device)
    if "vit" in args.arch:
        return get_vit_arch(args.arch)(
            **{name: getattr(args, name) for name in _VIT_OPTIONS},
            pos_embed_rope_dtype=getattr(args, "pos_embed_rope_dtype", "bf16"),
            layerscale_init=args.layerscale,
            drop_path_rate=drop_path_rate,
            img_size=img_size,
            in_chans=in_chans,
            device=device,
        )
    if "convnext" in args.arch:
        arch = get_convnext_arch(args.arch)
        return arch(patch_size=args.patch_size, drop_path_rate=drop_path_rate, in_chans=in_chans, device=device)
    raise NotImplementedError(
        f"unknown architecture {args.arch!r}: names contain 'vit' or 'convnext', or begin with timm: or torchvision:"
    )


def describe_backbone(args: Any) -> dict[str, Any]:
    """The plain values that `build_backbone` reads of a `student` section, to keep beside what was trained on it."""
    names = ("arch", "layerscale", "in_chans", "pos_embed_rope_dtype", *_VIT_OPTIONS)
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def build_model(
    args: Any,
    only_teacher: bool = False,
    img_size: int = 224,
    device: torch.device | str | None = None,
) -> tuple[Any, ...]:
    """Student and teacher backbones of one architecture; stochastic depth in the student alone.

    Returns:
        `(student, teacher, embed_dim)`, or `(teacher, embed_dim)` with `only_teacher`.
    """
    teacher = build_backbone(args, img_size=img_size, device=device)
    embed_dim = teacher.embed_dim
    if "vit" in args.arch:  # ConvNeXt teachers keep full precision, as in the published recipes
        teacher = init_fp8(teacher, args)
    if only_teacher:
        return teacher, embed_dim
    student = build_backbone(args, img_size=img_size, drop_path_rate=args.drop_path_rate, device=device)
    return init_fp8(student, args), teacher, embed_dim


def build_model_from_cfg(cfg: Any, only_teacher: bool = False) -> tuple[Any, ...]:
    """`build_model` on the meta device, from a whole training configuration."""
    return build_model(cfg.student, only_teacher=only_teacher, img_size=_largest_crop(cfg), device="meta")


def _largest_crop(cfg: Any) -> int:
    """Side of the global crops of a training configuration, of the largest ones if there are several."""
    crop_size = cfg.crops.global_crops_size
    return crop_size if isinstance(crop_size, int) else max(crop_size)


def build_model_for_eval(
    config: Any,
    pretrained_weights: str | Path | None,
    shard_unsharded_model: bool = False,
    device: torch.device | str | None = None,
    *,
    fp8: bool = False,
) -> nn.Module:
    """The teacher backbone of a training configuration, in evaluation mode.

    Args:
        config: a whole training configuration.
        pretrained_weights: whatever `checkpointer.weights.read_weights` knows (teacher file, DCP folder, released or
            Hugging Face weights); empty or None: random weights.
        shard_unsharded_model: with a process group, spread the parameters over its processes (FSDP).
        device: where to put the model, default the accelerator if there is one.
        fp8: compute in float8 where the configuration's training did; otherwise never.

    Raises:
        ValueError: the weights do not fit the configuration.
    """
    model = build_backbone(config.student, img_size=_largest_crop(config), device="meta")
    if fp8 and "vit" in config.student.arch:
        model = init_fp8(model, config.student)
    model.to_empty(device=device or default_device())
    if pretrained_weights:
        report = load_weights(model, read_weights(pretrained_weights, like=model))
        logger.info(f"loaded {pretrained_weights}: {report}")
    else:
        logger.warning("no pretrained weights: the backbone is random")
        cast(Backbone, model).init_weights()
    if shard_unsharded_model:
        _shard(model)
    return model.eval()


def init_fp8(model: nn.Module, args: Any) -> nn.Module:
    """`model`, its linear layers that match `args.fp8_filter` converted to float8 if `args.fp8_enabled`."""
    if not args.fp8_enabled:
        return model
    import torch._inductor.config as inductor_config

    inductor_config.triton.multi_kernel = 1  # the row scales are reductions that profit from it
    return convert_linears_to_fp8(model, filter=args.fp8_filter)


def _shard(model: nn.Module) -> None:
    if not torch.distributed.is_initialized():
        logger.warning("shard_unsharded_model has no effect without a process group")
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for unit in cast(Backbone, model).wrap_units():
        fully_shard(unit)
    fully_shard(model)
    for name in ("forward_features", "get_intermediate_layers"):
        register_fsdp_forward_method(model, name)
