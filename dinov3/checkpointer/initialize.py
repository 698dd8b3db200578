"""First weights of models: into sharded ones of a training, and into backbones for evaluation."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dinov3.checkpointer import files
from dinov3.checkpointer.checkpointer import load_model
from dinov3.checkpointer.inflate import inflate_patch_embedding
from dinov3.checkpointer.weights import NETWORKS, LoadReport, load_weights, read_weights

logger = logging.getLogger("dinov3")

_OTHER_PARTS = ("dino_head", "ibot_head", "dino_loss", "ibot_patch_loss")


def init_fsdp_model_from_checkpoint(
    model: nn.Module,
    checkpoint_path: str | os.PathLike[str],
    skip_load_keys: Iterable[str] | None = None,
    keys_not_sharded: Iterable[str] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Load all keys of a model that training holds (`backbone.…`, `dino_head.…`, …), sharded or not.

    Args:
        model: on its device. Its state dict must match: nothing may be missing, and only patch embeddings of RGB are
            changed in size, for models of other channels (`inflate_patch_embedding`).
        checkpoint_path: a DCP folder (an export of a teacher, or a training checkpoint: then its EMA teacher), of which
            each process reads only its shards, or a file that `read_weights` knows, a released backbone among them.
        skip_load_keys: entries of a file whose key contains one of these are ignored.
        keys_not_sharded: accepted; which tensors are sharded is read off the model.
        process_group: the processes over which `model` is sharded.

    Raises:
        FileNotFoundError: there is nothing at that path.
        ValueError, RuntimeError: the keys or shapes differ, and which.
    """
    path = Path(checkpoint_path)
    if files.is_dcp(path):
        prefix = _network_prefix(path)
        _refuse_more(path, f"model.{prefix}", model)
        load_model(path, model, prefix, process_group)
        return
    skipped = tuple(skip_load_keys or ())
    state = read_weights(checkpoint_path, part="all", like=dict(model.named_children()).get("backbone"))
    state = {key: value for key, value in state.items() if not any(part in key for part in skipped)}
    own = model.state_dict()
    state = inflate_patch_embedding(state, own)
    sharded = {key: shard_like(value, own[key]) if key in own else value for key, value in state.items()}
    report = load_weights(model, sharded)
    logger.info("loaded %s: %s", checkpoint_path, report)


def init_model_from_checkpoint_for_evals(
    model: nn.Module, pretrained_weights: str | os.PathLike[str], checkpoint_key: str | None = None
) -> LoadReport:
    """Load a backbone, whole, from whatever holds one; heads and losses beside it are ignored.

    Args:
        model: a backbone on its device.
        pretrained_weights: what `read_weights` knows.
        checkpoint_key: which network of a checkpoint with several, `"student"` say; `"teacher"` and None: the one that
            is evaluated, the EMA teacher. Any other name is that of an entry of the file, taken if it is there.

    Returns:
        What was loaded.

    Raises:
        ValueError: a key of the backbone is missing, unknown, or of another shape.
    """
    network = checkpoint_key if checkpoint_key in NETWORKS and checkpoint_key != "teacher" else None
    container = None if checkpoint_key in NETWORKS else checkpoint_key
    state = read_weights(pretrained_weights, network=network, container=container, like=model)
    report = load_weights(model, state, allow_unexpected=_OTHER_PARTS)
    logger.info("loaded %s: %s", pretrained_weights, report)
    return report


def _network_prefix(folder: Path) -> str:
    """`"model_ema."` or the like for the checkpoint of a whole training, `""` for that of one network."""
    first = {name.removeprefix("model.").partition(".")[0] for name in files.dcp_shapes(folder)}
    return next((f"{network}." for network in NETWORKS if network in first), "")


def _refuse_more(folder: Path, prefix: str, model: nn.Module) -> None:
    """A folder may hold further parts (heads of a model without), but no more tensors in the parts of this model."""
    own = set(model.state_dict())
    parts = {key.partition(".")[0] for key in own}
    held = [name.removeprefix(prefix) for name in files.dcp_shapes(folder) if name.startswith(prefix)]
    if unexpected := [name for name in held if name.partition(".")[0] in parts and name not in own]:
        raise ValueError(f"{folder} has {len(unexpected)} tensors that the model lacks: {', '.join(unexpected[:8])}")


def shard_like(value: Tensor, own: Tensor) -> Tensor:
    """The shard of `value` that this process holds, if `own` is sharded and has this shape; otherwise `value`."""
    if not isinstance(own, DTensor) or value.shape != own.shape:
        return value
    # Every process has read the file: each cuts out its own part, none is sent.
    local = value.to(device=own.device, dtype=own.dtype)
    return distribute_tensor(local, own.device_mesh, own.placements, src_data_rank=None)
