"""Starting from weights that exist: which they are, how they get into a network, and what of it stays as it is."""

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from dinov3.checkpointer import init_fsdp_model_from_checkpoint
from dinov3.checkpointer.weights import LoadReport, load_weights, read_state_dict, read_weights
from dinov3.hub.registry import BACKBONES
from dinov3.models.foreign import ForeignBackbone
from dinov3.train.teachers import HEADS, LOSS_CENTERS, NOT_SHARDED

logger = logging.getLogger("dinov3")

# What to do about a file without heads, for the settings that need them.
_WITHOUT_HEADS = {
    "student.resume_from_teacher_chkpt": "student.pretrained_weights starts from a backbone, with fresh heads",
    "distillation.checkpoint_path": "MODEL.META_ARCHITECTURE=FeatureDistillation distils from a backbone alone",
}
_OWN_MODEL = "backbone.model."
_NOT_IN_A_BACKBONE = (*HEADS, *LOSS_CENTERS)
_TOKENS_AND_EMBEDDINGS = ("patch_embed.", "cls_token", "storage_tokens", "mask_token")


def load_network(network: nn.ModuleDict, source: str, key: str, group: ProcessGroup | None) -> None:
    """Load a network whole, from anything that `read_weights` knows or by the name of a backbone of the hub.

    Args:
        network: has a `backbone` and perhaps heads; without heads, those of the source are ignored.
        source: a hub name (`dinov3_vits16`: Meta's file, from the cache of torch.hub), a file, an address, a Hugging
            Face folder or name, a teacher checkpoint, or a folder of sharded weights.
        key: the setting that named the source, for messages.
        group: the processes over which the network is sharded.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: it isn't this network; says how many tensors match and are missing, and which settings would fit.
    """
    if isinstance(network["backbone"], ForeignBackbone):
        _load_foreign(network["backbone"], source, key)
        return
    skipped = LOSS_CENTERS if HEADS[0] in network else _NOT_IN_A_BACKBONE
    path = resolve(source)
    try:
        init_fsdp_model_from_checkpoint(
            network, path, skip_load_keys=skipped, keys_not_sharded=NOT_SHARDED, process_group=group
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{key}={source}: {_explain(network, path, key, skipped) or error}") from error


def _load_foreign(backbone: ForeignBackbone, source: str, key: str) -> None:
    """Load a file with the names of the library, or an export of a training with such a student."""
    state = read_state_dict(source)
    ours = {name: value for name, value in state.items() if name.startswith(_OWN_MODEL)}
    state = {name.removeprefix(_OWN_MODEL): value for name, value in (ours or state).items()}
    try:
        load_weights(backbone.model, state)
    except ValueError as error:
        raise ValueError(f"{key}={source}: {error}") from error


def resolve(source: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The address of a backbone of the hub, if `source` is one's name; anything else as it is."""
    entry = BACKBONES.get(str(source))
    if entry is None or os.path.exists(source):
        return source
    weights, digits = next(iter(entry.hashes.items()))
    return entry.url(weights, hash=digits)


def freeze_first_blocks(backbone: nn.Module, n: int) -> None:
    """Stop the first `n` blocks of a ViT from learning, together with patch embedding and tokens; 0: nothing.

    Nothing before block `n` needs a gradient then, so their activations aren't kept either.

    Raises:
        ValueError: the backbone has no such blocks.
    """
    if n == 0:
        return
    blocks = getattr(backbone, "blocks", ())
    if not 0 <= n <= len(blocks):
        raise ValueError(f"student.frozen_blocks is {n}, the backbone has {len(blocks)} blocks to freeze")
    for name, param in backbone.named_parameters():
        block = re.match(r"blocks\.(\d+)\.", name)
        if name.startswith(_TOKENS_AND_EMBEDDINGS) or (block and int(block[1]) < n):
            param.requires_grad_(False)


def _explain(network: nn.ModuleDict, path: str | os.PathLike[str], key: str, skipped: tuple[str, ...]) -> str:
    """Why a source is not this network, or nothing if it is (then the failure has another reason)."""
    state = read_weights(path, part="all", like=network["backbone"])
    state = {name: value for name, value in state.items() if not any(part in name for part in skipped)}
    report = compare(network, state)
    if not (report.missing or report.unexpected or report.misshapen):
        return ""
    lines = [f"these are not weights of this network: {report}"]
    if key in _WITHOUT_HEADS and all(name.startswith("backbone.") for name in state):
        lines.append(f"it holds a backbone without heads; {_WITHOUT_HEADS[key]}")
    held = describe({name.removeprefix("backbone."): value for name, value in state.items()})
    wanted = describe({name.removeprefix("backbone."): value for name, value in network.state_dict().items()})
    if different := [f"{name}={value}" for name, value in held.items() if wanted.get(name) != value]:
        lines.append(f"its backbone has {', '.join(different)}")
    return "; ".join(lines)


def compare(network: nn.Module, state: Mapping[str, Tensor]) -> LoadReport:
    """How a state dict fits a network; nothing is loaded."""
    own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    common = {name: tuple(state[name].shape) for name in own if name in state}
    misshapen = {name: (shape, own[name]) for name, shape in common.items() if shape != own[name]}
    missing = tuple(name for name in own if name not in state)
    unexpected = tuple(name for name in state if name not in own)
    return LoadReport(len(common) - len(misshapen), missing, unexpected, misshapen)


def describe(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings of a ViT that its tensors tell, by their names in the section `student`; {} for other networks."""
    if "cls_token" not in state or "patch_embed.proj.weight" not in state:
        return {}
    depth = 1 + max((int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    storage = state.get("storage_tokens")
    return {
        "width": state["cls_token"].shape[-1],
        "blocks": depth,
        "student.patch_size": state["patch_embed.proj.weight"].shape[-1],
        "student.n_storage_tokens": 0 if storage is None else storage.shape[1],
        "student.ffn_layer": "swiglu" if "blocks.0.mlp.w1.weight" in state else "mlp",
        "student.qkv_bias": str("blocks.0.attn.qkv.bias" in state).lower(),
        "student.mask_k_bias": str("blocks.0.attn.qkv.bias_mask" in state).lower(),
        "student.untie_cls_and_patch_norms": str("cls_norm.weight" in state).lower(),
        "student.untie_global_and_local_cls_norm": str("local_cls_norm.weight" in state).lower(),
    }
