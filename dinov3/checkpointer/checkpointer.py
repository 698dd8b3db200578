"""Saving and loading the state of a run: iteration, model, optimizer, and whatever else has a `state_dict`.

Checkpoints are folders of torch.distributed.checkpoint (DCP). They don't depend on the number of processes, on
activation checkpointing or compilation, and need no process group. Names are those of the unwrapped model.
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from dinov3 import distributed
from dinov3.checkpointer import files
from dinov3.checkpointer.dcp import AliasingWriter, CheckpointError, LoadPlanner, SafeReader, clear_errors
from dinov3.checkpointer.directories import abandon_saving, begin_saving, finish_saving
from dinov3.utils.modules import unwrapped_name

logger = logging.getLogger("dinov3")

T = TypeVar("T")


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
        CheckpointError: a RuntimeError, in every process of the group: the folder exists and `overwrite` is False, or
            writing failed (a full disk). What was there before is unchanged.
    """
    state = state_to_save(iteration, model, optimizer, **others)
    write_checkpoint(Path(ckpt_dir), state, overwrite=overwrite, process_group=process_group)


@dataclass(frozen=True)
class SavedState:
    """What goes into a checkpoint.

    Attributes:
        content: nested state, each tensor once.
        aliases: further flat name of a tensor -> the one under which `content` has it.
    """

    content: Mapping[str, Any]
    aliases: Mapping[str, str]

    def copy_to_cpu(self) -> "SavedState":
        """A copy that later changes of the model don't reach."""
        content = {name: _state_of(value) for name, value in self.content.items()}
        return SavedState(BlockingAsyncStager().stage(content), self.aliases)


def _state_of(value: Any) -> Any:
    return value.state_dict() if hasattr(value, "state_dict") else value


def state_to_save(
    iteration: int | str, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **others: Any
) -> SavedState:
    """The state to save, without the doubles of tensors that the model holds under several names."""
    state = _nested_state(model, optimizer)
    for group in state.get("optimizer", {}).get("param_groups", ()):
        group.update({key: _plain_number(value) for key, value in group.items()})
    aliases = {
        alias: names[-1] for names in _shared_names(model, state["model"]) for alias in names[:-1]
    }  # the last name is the one that says what it is: `model_ema`, not `teacher`
    for alias in aliases:
        del state["model"][alias]
    content = {"iteration": iteration, **state, **others}
    return SavedState(content, {f"model.{alias}": f"model.{name}" for alias, name in aliases.items()})


def write_checkpoint(
    target: Path, state: SavedState, *, overwrite: bool = True, process_group: dist.ProcessGroup | None = None
) -> None:
    """Write the folder `target`, as `save_checkpoint`."""
    what = f"cannot save the checkpoint {target}"

    def begin() -> None:
        if target.exists() and not overwrite:
            raise RuntimeError("it exists already")
        begin_saving(target)

    temporary = target.with_name(f".saving-{target.name}")
    in_main_process(begin, process_group, what)
    try:
        with clear_errors(what, CheckpointError):
            writer = AliasingWriter(temporary, state.aliases)
            dcp.save(dict(state.content), storage_writer=writer, process_group=process_group)
    except CheckpointError:
        if distributed.is_main_process(process_group):
            abandon_saving(temporary)
        raise
    in_main_process(lambda: finish_saving(temporary, target), process_group, what)
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

    What the checkpoint has beyond that is ignored, and so are the settings of its parameter groups (learning rates and
    the like) if parameters are grouped otherwise now. No code in a checkpoint is run. Collective over `process_group`.

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
    own_groups = [dict(group) for group in state["optimizer"]["param_groups"]] if optimizer is not None else []
    optional = {name for name, value in others.items() if getattr(value, "may_be_missing", False)}
    planner = LoadPlanner(may_be_missing=optional if strict_loading else "all")
    with clear_errors(f"cannot load the checkpoint {folder}"):
        dcp.load(state, storage_reader=SafeReader(folder), planner=planner, process_group=process_group)
    model_state = state["model"]
    model_state |= {alias: model_state[name] for alias, name in left_out.items()}
    if optimizer is None:
        set_model_state_dict(model, model_state)
    else:
        groups = state["optimizer"]["param_groups"]
        if [group["params"] for group in groups] != [group["params"] for group in own_groups]:
            logger.warning("parameters are grouped otherwise than in the checkpoint: groups keep their settings")
            state["optimizer"]["param_groups"] = own_groups
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


def _state_to_load(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, names: frozenset[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """As `state_to_save`, but each tensor under the one of its names that the checkpoint has."""
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


def in_main_process(action: Callable[[], T], group: dist.ProcessGroup | None, what: str) -> T:
    """What `action` returns in rank 0 of the group, in all its processes; it only runs there. Collective.

    Raises:
        CheckpointError: in all of them, beginning with `what`: the action failed with an OSError or a RuntimeError.
    """
    outcome: list[Any] = [None, None]  # error, result
    if distributed.is_main_process(group):
        try:
            outcome[1] = action()
        except (OSError, RuntimeError) as error:
            outcome[0] = f"{what}: {error}"
    if distributed.get_world_size(group) > 1:
        dist.broadcast_object_list(outcome, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    if outcome[0] is not None:
        raise CheckpointError(outcome[0])
    result: T = outcome[1]
    return result
