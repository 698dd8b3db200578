"""Saving and loading the state of a run: iteration, model, optimizer, and whatever else has a `state_dict`.

Checkpoints are folders of torch.distributed.checkpoint (DCP). They don't depend on the number of processes, on
activation checkpointing or compilation, and need no process group. Names are those of the unwrapped model.
"""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from dinov3 import distributed
from dinov3.checkpointer import files
from dinov3.checkpointer.dcp import AliasingWriter, LoadPlanner, SafeReader, clear_errors
from dinov3.checkpointer.directories import abandon_saving, begin_saving, finish_saving
from dinov3.utils.modules import unwrapped_name

logger = logging.getLogger("dinov3")


def save_checkpoint(
    ckpt_dir: str | os.PathLike[str],
    *,
    iteration: int | str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    overwrite: bool = True,
    process_group: dist.ProcessGroup | None = None,
    **others: Any,
) -> None:
    """Write a checkpoint to the folder `ckpt_dir`, and return when it is there.

    It is written under another name first: whenever the process is killed, the old folder or the new one is complete.
    Collective over `process_group`.

    Args:
        ckpt_dir: the checkpoint's own folder, such as `<output>/ckpt/<iteration>`.
        iteration: index of the last finished iteration, or the name of an export.
        model: any module, sharded or not. Parameters that it holds under several names are stored once.
        optimizer: its state is stored under the names of the parameters.
        overwrite: replace a folder that exists.
        process_group: the processes over which the model is sharded; default: the world.
        others: objects with `state_dict` and `load_state_dict`, or plain data, by name.

    Raises:
        RuntimeError: the folder exists and `overwrite` is False, or writing failed (a full disk). What was there before
            is unchanged.
    """
    target = Path(ckpt_dir)

    def begin() -> None:
        if target.exists() and not overwrite:
            raise RuntimeError(f"the checkpoint {target} exists already")
        begin_saving(target)

    temporary = target.with_name(f".saving-{target.name}")
    _in_main_process(begin, process_group, f"cannot save the checkpoint {target}")
    state, aliases = _state_to_save(model, optimizer)
    state = {"iteration": iteration, **state, **others}
    writer = AliasingWriter(temporary, {f"model.{alias}": f"model.{name}" for alias, name in aliases.items()})
    try:
        with clear_errors(f"cannot save the checkpoint {target}"):
            dcp.save(state, storage_writer=writer, process_group=process_group)
    except RuntimeError:
        if distributed.is_main_process(process_group):
            abandon_saving(temporary)
        raise
    _in_main_process(lambda: finish_saving(temporary, target), process_group, f"cannot save the checkpoint {target}")
    logger.info("saved the checkpoint %s", target)


def load_checkpoint(
    ckpt_dir: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    strict_loading: bool = True,
    process_group: dist.ProcessGroup | None = None,
    **others: Any,
) -> Any:
    """Load a checkpoint into objects as they were given to `save_checkpoint`; returns its iteration.

    What the checkpoint has beyond that is ignored. No code in a checkpoint is run. Collective over `process_group`.

    Args:
        ckpt_dir: the checkpoint's own folder.
        model: on its device, sharded or not (the number of processes may have changed).
        optimizer: over the parameters of `model`.
        strict_loading: False: keys that the checkpoint lacks keep their values, with a warning.
        process_group: the processes over which the model is sharded; default: the world.
        others: objects with `state_dict` and `load_state_dict`, or nested plain data, by name.

    Raises:
        FileNotFoundError: there is no checkpoint at `ckpt_dir`.
        RuntimeError: keys are missing or have other shapes, which the message names, or a file is damaged.
    """
    folder = Path(ckpt_dir)
    names = _names_in(folder)
    state, left_out = _state_to_load(model, optimizer, names)
    state = {"iteration": None, **state, **others}
    optional = {name for name, value in others.items() if getattr(value, "may_be_missing", False)}
    planner = LoadPlanner(may_be_missing=optional if strict_loading else "all")
    with clear_errors(f"cannot load the checkpoint {folder}"):
        dcp.load(state, storage_reader=SafeReader(folder), planner=planner, process_group=process_group)
    model_state = state["model"]
    model_state |= {alias: model_state[name] for alias, name in left_out.items()}
    if optimizer is None:
        set_model_state_dict(model, model_state)
    else:
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=state["optimizer"])
    logger.info("loaded the checkpoint %s (iteration %s)", folder, state["iteration"])
    return state["iteration"]


def load_model(
    folder: str | os.PathLike[str], model: nn.Module, prefix: str = "", process_group: dist.ProcessGroup | None = None
) -> None:
    """Load the tensors `model.<prefix><key>` of a checkpoint folder into the keys of a model, all of them.

    Each process reads only its own shards. Collective over `process_group`.

    Raises:
        RuntimeError: keys are missing or have other shapes.
    """
    state = get_model_state_dict(model)
    wanted = {"model": {prefix + key: value for key, value in state.items()}}
    with clear_errors(f"cannot load {folder} into the model"):
        dcp.load(wanted, storage_reader=SafeReader(folder), planner=LoadPlanner(()), process_group=process_group)
    set_model_state_dict(model, {key: wanted["model"][prefix + key] for key in state})


def _names_in(folder: Path) -> frozenset[str]:
    if not files.is_dcp(folder):
        raise FileNotFoundError(
            f"there is no checkpoint at {folder}: expected a folder with .metadata and *.distcp files"
            + ("" if folder.exists() else " (it doesn't exist)")
        )
    try:
        return frozenset(files.read_dcp_metadata(folder).state_dict_metadata)
    except ValueError as error:
        raise RuntimeError(f"cannot load the checkpoint {folder}: {error}") from error


def _state_to_save(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Nested state of model and optimizer without doubles, and further name -> name of what was left out."""
    state = _nested_state(model, optimizer)
    if "optimizer" in state:
        for group in state["optimizer"]["param_groups"]:
            group.update({key: _plain_number(value) for key, value in group.items()})
    aliases = {
        alias: names[-1] for names in _shared_names(model, state["model"]) for alias in names[:-1]
    }  # the last name is the one that says what it is: `model_ema`, not `teacher`
    for alias in aliases:
        del state["model"][alias]
    return state, aliases


def _state_to_load(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, names: frozenset[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """As `_state_to_save`, but each tensor under the one of its names that the checkpoint has."""
    state = _nested_state(model, optimizer)
    left_out: dict[str, str] = {}
    for shared in _shared_names(model, state["model"]):
        present = next((name for name in reversed(shared) if f"model.{name}" in names), shared[-1])
        left_out |= {name: present for name in shared if name != present}
    for name in left_out:
        del state["model"][name]
    return state, left_out


def _nested_state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    if optimizer is None:
        return {"model": dict(get_model_state_dict(model))}
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": dict(model_state), "optimizer": optimizer_state}


def _shared_names(model: nn.Module, state: Mapping[str, Any]) -> list[list[str]]:
    """The keys of each tensor that the model holds under several."""
    by_tensor: dict[int, list[str]] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if (key := unwrapped_name(name)) in state:
            by_tensor.setdefault(id(tensor), []).append(key)
    return [names for names in by_tensor.values() if len(names) > 1]


def _plain_number(value: Any) -> Any:
    """NumPy numbers (schedules are NumPy arrays) as Python numbers, which any reader understands."""
    return value.item() if type(value).__module__ == "numpy" and hasattr(value, "item") else value


def _in_main_process(action: Callable[[], Any], group: dist.ProcessGroup | None, what: str) -> None:
    """Run `action` in rank 0 of the group while the others wait; all of them raise if it fails."""
    message: list[str | None] = [None]
    if distributed.is_main_process(group):
        try:
            action()
        except (OSError, RuntimeError) as error:
            message = [f"{what}: {error}"]
    if distributed.get_world_size(group) > 1:
        dist.broadcast_object_list(message, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    if message[0] is not None:
        raise RuntimeError(message[0])
