"""Formats of weight files: bytes on disk -> tensors, never running code that a file may hold.

Three formats: `torch.save` archives (read with `weights_only=True`), safetensors (read here, with torch alone, so
that the hub needs nothing else), and folders of `torch.distributed.checkpoint` (DCP), whose pickled index is read by
an unpickler that knows only the classes such an index is made of. Files are recognised by their first bytes, never by
name, and mapped into memory where the format allows. What the tensors mean is the business of `layouts.py`.
"""

import importlib
import io
import json
import math
import pathlib
import pickle
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_SAFETENSORS_HEADER = 100_000_000  # bytes; the limit of the format


def sniff(path: Path) -> str:
    """The format of a file: `"torch"`, `"torch-legacy"` or `"safetensors"`.

    Raises:
        ValueError: it is none of these, or its end is missing; the message says what the file looks like.
    """
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):  # the directory of a zip archive stands at its end
            raise ValueError(f"{path} is cut off: it begins like a torch file, but its end is missing; fetch it again")
        return "torch"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_SAFETENSORS_HEADER:
        return "safetensors"
    if head.startswith(b"\x80"):
        return "torch-legacy"
    raise ValueError(f"{path} is not a weight file: {_what_it_is(head)}; expected a torch.save or safetensors file")


def _what_it_is(head: bytes) -> str:
    if not head:
        return "it is empty"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"<"):
        return "it is a web page (a login or error page saved in place of the weights?)"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself (run `git lfs pull`)"
    return f"it begins with {head[:16]!r}"


def read_file(path: Path) -> Any:
    """The content of a torch or safetensors file, on the CPU.

    Raises:
        ValueError: not such a file, damaged, or holding Python objects other than plain containers and tensors.
    """
    kind = sniff(path)
    if kind == "safetensors":
        return read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "torch")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was not loaded: it is damaged, or holds Python objects besides tensors and plain containers, "
            f"which could run code. Take a plain state dict from a source you trust. ({_first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged or not a file of torch.save: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory (copy on write).

    Raises:
        ValueError: the header is not valid, or the file shorter than it says.
    """
    header, start = _safetensors_header(path)
    size = path.stat().st_size
    entries: dict[str, tuple[torch.dtype, list[int], int, int]] = {}
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                entries[name] = _SAFETENSORS_DTYPES[entry["dtype"]], list(entry["shape"]), start + begin, start + end
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has an entry that is not valid in a safetensors header: {error!r}") from error
    last = max((end for *_, end in entries.values()), default=start)
    if last > size:
        raise ValueError(f"{path} is cut off: it has {size:,} bytes, its header says {last:,}; fetch it again")
    for name, (dtype, shape, begin, end) in entries.items():
        if begin < start or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: the size of {name!r} does not fit its shape {shape}; the file is damaged")

    raw = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    state = {}
    for name, (dtype, shape, begin, end) in entries.items():
        data = raw[begin:end]
        if begin % dtype.itemsize:  # old writers did not align
            data = data.clone()
        state[name] = data.view(dtype).reshape(shape)
    return state


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header and the position of the first data byte."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length)
    if len(text) < length:
        raise ValueError(f"{path} is cut off inside its header; fetch it again")
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} has no valid safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} has no valid safetensors header: got {type(header).__name__}, expected an object")
    return header, 8 + length


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the `config.json` ({} if there is none) of a Hugging Face folder, sharded or not.

    Raises:
        ValueError: the folder holds no `model.safetensors`, or not all of its shards.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if any(Path(name).name != name for name in names):  # shards lie in the folder itself
                raise ValueError(f"it names files elsewhere: {names}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not a valid index of shards: {error!r}") from error
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        found = sorted(entry.name for entry in folder.iterdir())
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}; it holds {', '.join(found[:12]) or 'nothing'}. Expected a weight "
            "file, a Hugging Face folder (config.json and model.safetensors), or a checkpoint folder (.metadata and "
            "*.distcp, such as <output>/ckpt/<iteration>)"
        )
    state: dict[str, Tensor] = {}
    for name in names:
        state |= read_safetensors(folder / name)
    return state, read_config(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json` in a folder if it describes a DINOv3 model of Hugging Face, else {}."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return config if isinstance(config, dict) and str(config.get("model_type", "")).startswith("dinov3") else {}


# --- torch.distributed.checkpoint ------------------------------------------------------------------------------------


def is_dcp(path: Path) -> bool:
    """Whether `path` is a folder written by `torch.distributed.checkpoint`."""
    return (path / ".metadata").is_file()


def dcp_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of all tensors in a DCP folder."""
    entries = read_dcp_metadata(folder).state_dict_metadata
    return {name: tuple(entry.size) for name, entry in entries.items() if hasattr(entry, "size")}


def read_dcp(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The named tensors of a DCP folder, whole and on the CPU, in one process whatever number of ranks wrote it.

    No collective is called: each process that calls this reads for itself.
    """
    import torch.distributed.checkpoint as dcp

    metadata = read_dcp_metadata(folder)

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            metadata.storage_meta = dcp.metadata.StorageMeta(load_id=self.load_id)
            return metadata

    entries = {name: metadata.state_dict_metadata[name] for name in names}
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
        dcp.load(state, storage_reader=Reader(folder), no_dist=True)
    return state


class _IndexUnpickler(pickle.Unpickler):
    """Reads the index of a DCP folder; any global that such an index does not need is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "pathlib" and name.endswith(
            "Path"
        ):  # the writer's own path, perhaps from another operating system
            return pathlib.PurePath
        if module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"):
            found = getattr(importlib.import_module(module), name, None)
            if isinstance(found, type) and found.__module__ == module and hasattr(found, "__dataclass_fields__"):
                return found
            if name == "_MEM_FORMAT_ENCODING":
                return found
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"{module}.{name} has no place in the index of a checkpoint")


def read_dcp_metadata(folder: Path) -> Any:
    """The index of a DCP folder (a `torch.distributed.checkpoint.metadata.Metadata`).

    Raises:
        ValueError: it is damaged, or holds objects that have no place in an index.
    """
    path = folder / ".metadata"
    # Imported for the class definitions that the index refers to.
    importlib.import_module("torch.distributed.checkpoint")
    try:
        metadata = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
        metadata.state_dict_metadata  # noqa: B018  (is it an index at all?)
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or not the index of a checkpoint: {_first_line(error)}") from error
    return metadata
