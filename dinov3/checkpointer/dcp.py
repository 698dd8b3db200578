"""torch.distributed.checkpoint (DCP), made safe to read, economical with equal tensors, and clear about errors."""

import contextlib
import dataclasses
import io
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from dinov3 import distributed
from dinov3.checkpointer import files

logger = logging.getLogger("dinov3")


class CheckpointError(RuntimeError):
    """A checkpoint or an export could not be written. All processes of the group get this error."""


class AliasingWriter(dcp.FileSystemWriter):
    """Stores a tensor once and lets the index name it more than once.

    Args:
        path: folder to write into.
        aliases: further name -> name under which the tensor is written. A reader finds both.
    """

    def __init__(self, path: str | os.PathLike[str], aliases: Mapping[str, str]) -> None:
        super().__init__(path, single_file_per_rank=True, sync_files=True)
        self.aliases = dict(aliases)

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        """Write the index (in the coordinating process)."""
        others: dict[str, list[str]] = {}
        for alias, name in self.aliases.items():
            others.setdefault(name, []).append(alias)
            metadata.state_dict_metadata[alias] = metadata.state_dict_metadata[name]
            if metadata.planner_data and name in metadata.planner_data:
                # How to put the flat name back into nested dictionaries: "model.<key>" is ("model", "<key>").
                first, _ = metadata.planner_data[name]
                metadata.planner_data[alias] = (first, alias.removeprefix(f"{first}."))
        copies = [
            dataclasses.replace(result, index=dataclasses.replace(result.index, fqn=alias))
            for written in results
            for result in written
            for alias in others.get(result.index.fqn, ())
        ]
        super().finish(metadata, [*results, copies])


class SafeReader(dcp.FileSystemReader):
    """Reads an index without running code that it may hold."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """The index."""
        metadata = files.read_dcp_metadata(Path(self.path))
        metadata.storage_meta = dcp.metadata.StorageMeta(load_id=self.load_id)
        return metadata


class LoadPlanner(dcp.DefaultLoadPlanner):
    """Compares names and shapes before anything is read, and says all that is wrong.

    Args:
        may_be_missing: "all", or the first words of names that the checkpoint may lack.
    """

    def __init__(self, may_be_missing: Collection[str] | str) -> None:
        super().__init__(allow_partial_load=True)
        self.may_be_missing = may_be_missing

    def create_local_plan(self) -> Any:
        """Plan what this process reads."""
        assert self.metadata is not None
        saved: dict[str, Any] = dict(self.metadata.state_dict_metadata)
        missing = [name for name in self.state_dict if name not in saved]
        refused = [name for name in missing if not self._is_allowed(name)]
        misshapen = [
            f"{name} is {list(saved[name].size)} in the checkpoint, {list(value.size())} here"
            for name, value in self.state_dict.items()
            if isinstance(value, torch.Tensor) and name in saved and getattr(saved[name], "size", None) != value.size()
        ]
        problems = [f"{len(refused)} keys are missing: {_listed(refused)}"] if refused else []
        problems += [f"{len(misshapen)} keys have other shapes: {_listed(misshapen)}"] if misshapen else []
        if problems:
            raise ValueError("; ".join(problems))
        if missing and distributed.get_rank() == 0:
            logger.warning("%d keys are not in the checkpoint and stay as they are: %s", len(missing), _listed(missing))
        return super().create_local_plan()

    def _is_allowed(self, name: str) -> bool:
        return self.may_be_missing == "all" or name.partition(".")[0] in self.may_be_missing

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Take over an object that isn't a tensor."""
        name = read_item.dest_index.fqn
        with _numpy_scalars_allowed():
            content = torch.load(value, weights_only=True)
        node: Any = self.original_state_dict
        *path, last = self.mappings[name]
        for step in path:
            node = node[step]
        node[last] = content


@contextlib.contextmanager
def _numpy_scalars_allowed() -> Iterator[None]:
    """Checkpoints of the original code hold learning rates as NumPy numbers."""
    try:
        import numpy as np
    except ImportError:
        yield
        return
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [np.dtype, *(type(np.dtype(name)) for name in ("float64", "float32", "int64"))]
    # The function has moved: NumPy 2 reads files of NumPy 1 and the other way round.
    allowed += [(scalar, f"{module}.multiarray.scalar") for module in ("numpy.core", "numpy._core")]
    with torch.serialization.safe_globals(allowed):
        yield


def _repair_broadcasts_of_torch_2_7() -> None:
    """Let DCP work in a subgroup: up to 2.7 it broadcasts from rank 0 of the world, which may be outside the group."""
    if not torch.__version__.startswith("2.7."):
        return

    def broadcast_object(self: Any, object: Any) -> Any:
        content = [object]
        if self.use_dist:
            dist.broadcast_object_list(content, src=self.global_coordinator_rank, group=self.group)
        return content[0]

    dcp.utils._DistWrapper.broadcast_object = broadcast_object  # type: ignore[method-assign]


@contextlib.contextmanager
def clear_errors(what: str, kind: type[RuntimeError] = RuntimeError) -> Iterator[None]:
    """Turn what DCP raises (not an `Exception`) into an error of a kind, in words that begin with `what`."""
    _repair_broadcasts_of_torch_2_7()
    # Not `catch_warnings`: checkpoints are saved in a thread, and what that restores belongs to all threads.
    warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single process")
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # DCP of torch 2.7 uses it
    try:
        yield
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        ranks = f" (rank {rank})" if len(error.failures) < 2 and rank else ""
        raise kind(f"{what}{ranks}: {reason or type(reason).__name__}") from error


def _listed(names: Collection[str], limit: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f", … and {len(names) - limit} more" if len(names) > limit else "")
