"""Parameter groups of the optimizer: layer-wise learning rates, and which parameters decay."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from dinov3.utils.modules import unwrapped_name

_EMBEDDINGS = ("pos_embed", "patch_embed", "mask_token", "cls_token", "storage_tokens")
_NO_DECAY = ("norm", "gamma", "fourier_w")

ParamGroup = dict[str, Any]


def remove_fsdp_compile_names(name: str) -> str:
    """`name` of a parameter as it was before the model was wrapped, compiled or parametrized."""
    return unwrapped_name(name)


def get_vit_lr_decay_rate(
    name: str,
    lr_decay_rate: float = 1.0,
    num_layers: int = 12,
    force_is_backbone: bool = False,
    chunked_blocks: bool = False,
) -> float:
    """Factor of the learning rate of a ViT's parameter: lr_decay_rate ** (layers between it and the output).

    Embeddings and tokens are layer 0, block i is layer i + 1, everything else (final norms) is layer num_layers + 1
    and gets 1.

    Args:
        name: of the parameter.
        lr_decay_rate: factor from a layer to the one before it.
        num_layers: number of blocks.
        force_is_backbone: take `name` for a backbone's; otherwise it must start with "backbone", or the factor is 1.
        chunked_blocks: blocks are called `blocks.<chunk>.<i>`.
    """
    layer = num_layers + 1
    if force_is_backbone or name.startswith("backbone"):
        if any(part in name for part in _EMBEDDINGS):
            layer = 0
        elif "residual." not in name:
            block = re.search(r"(?:^|\.)blocks\." + (r"\d+\." if chunked_blocks else "") + r"(\d+)\.", name)
            layer = int(block[1]) + 1 if block else layer
    return lr_decay_rate ** (num_layers + 1 - layer)


def get_params_groups_with_decay(
    model: nn.Module,
    lr_decay_rate: float = 1.0,
    patch_embed_lr_mult: float = 1.0,
    dino_head_wd_multiplier: float = 1.0,
    *,
    module_name: str = "",
) -> list[ParamGroup]:
    """One group for each trainable parameter of a backbone or head, in the order of the model.

    Args:
        model: layers are counted in its `blocks`; without that (ConvNeXt, heads) learning rates don't depend on depth.
        lr_decay_rate: see `get_vit_lr_decay_rate`.
        patch_embed_lr_mult: further factor of the learning rate of the patch embedding.
        dino_head_wd_multiplier: factor of the weight decay of a module whose name contains "dino_head".
        module_name: what the model is called by its owner; parameter names don't tell.

    Returns:
        Groups with `name` (clean, relative to the model), `params`, `lr_multiplier`, `wd_multiplier` (0 for biases,
        norms, layer scales; tokens and ConvNeXt's unnamed norms do decay) and `is_last_layer`.
    """
    n_blocks = len(getattr(model, "blocks", ()))
    groups: list[ParamGroup] = []
    for wrapped_name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        name = remove_fsdp_compile_names(wrapped_name)
        lr_multiplier = (
            get_vit_lr_decay_rate(name, lr_decay_rate, n_blocks, force_is_backbone=True) if n_blocks else 1.0
        )
        if "patch_embed" in name:
            lr_multiplier *= patch_embed_lr_mult
        if name.endswith("bias") or any(part in name for part in _NO_DECAY):
            wd_multiplier = 0.0
        else:
            wd_multiplier = dino_head_wd_multiplier if "dino_head" in f"{module_name}.{name}" else 1.0
        groups.append(
            {
                "name": name,
                "params": [param],
                "lr_multiplier": lr_multiplier,
                "wd_multiplier": wd_multiplier,
                "is_last_layer": "last_layer" in name,
            }
        )
    return groups


# Sharded models differ in the wrapped names only, which are cleaned anyway.
get_params_groups_with_decay_fsdp = get_params_groups_with_decay


def fuse_params_groups(
    all_params_groups: Iterable[Mapping[str, Any]],
    keys: Sequence[str] = ("lr_multiplier", "wd_multiplier", "is_last_layer"),
) -> list[ParamGroup]:
    """Merge groups that agree in `keys`, in the order in which they first appear; other entries are dropped."""
    fused: dict[tuple[Any, ...], ParamGroup] = {}
    for group in all_params_groups:
        values = tuple(group[key] for key in keys)
        target = fused.setdefault(values, {**dict(zip(keys, values, strict=True)), "params": []})
        params = group["params"]
        target["params"] += [params] if isinstance(params, nn.Parameter) else list(params)
    return list(fused.values())
