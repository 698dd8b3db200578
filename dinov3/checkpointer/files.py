"""Formats of weight files: bytes on disk -> tensors, never running code that a file may hold.

Three formats: `torch.save` archives (read with `weights_only=True`), safetensors (read here, with torch alone, so
that the hub needs nothing else), and folders of `torch.distributed.checkpoint` (DCP), whose pickled index is read by
an unpickler that knows only the classes such an index is made of. Files are recognised by their first bytes, never by
name, and mapped into memory where the format allows. What the tensors mean is the business of `layouts.py`.
"""

import errno
import importlib
import io
import json
import math
import pathlib
import pickle
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

from dinov3.utils.files import read_json

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
_SIZES_FOLLOW = 8  # flag of parts of zip archives whose data a record of its size follows
_IS_A_FOLDER = 0x10  # attribute of parts of zip archives: torch then reads nothing, and returns what memory held before
_MAX_SAFETENSORS_HEADER = 100_000_000  # bytes; the limit of the format


def sniff(path: Path) -> str:
    """The format of a file: `"torch"`, `"torch-legacy"` or `"safetensors"`.

    Raises:
        ValueError: it is none of these, or its end is missing; the message says what the file looks like.
    """
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"PK\x03\x04"):
        try:
            whole = zipfile.is_zipfile(path)  # the directory of a zip archive stands at its end
        except zipfile.BadZipFile:
            whole = False
        if not whole:
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


def read_file(path: Path, *, mapped: bool = True) -> Any:
    """The content of a torch or safetensors file, on the CPU.

    Args:
        path: the file.
        mapped: torch files are mapped into memory, and must not be changed or deleted while the tensors are in use.

    Raises:
        ValueError: not such a file, damaged, or holding Python objects other than plain containers and tensors.
    """
    kind = sniff(path)
    if kind == "safetensors":
        return read_safetensors(path)
    if kind == "torch":
        _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and kind == "torch")
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was not loaded: it is damaged, or holds Python objects besides tensors and plain containers, "
            f"which could run code. Take a plain state dict from a source you trust. ({_first_line(error)})"
        ) from error
    except Exception as error:  # a damaged file can make an unpickler raise anything
        raise ValueError(f"{path} is damaged or not a file of torch.save: {_first_line(error)}") from error


def _check_archive(path: Path) -> None:
    """Refuse an archive of `torch.save` whose parts don't lie where they should, or whose description is damaged.

    torch looks at neither, and a few wrong bits there can give every tensor other values. The bytes of tensors
    themselves are not read, so a wrong bit there stays unseen: comparing hashes finds that.
    """
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            end = archive.start_dir
            for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset, reverse=True):
                _check_entry(file, entry, end)
                end = entry.header_offset
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a position before the beginning
            raise
        raise ValueError(f"{path} is damaged, fetch it again: {_first_line(error)}") from error


def _check_entry(file: IO[bytes], entry: zipfile.ZipInfo, end: int) -> None:
    """Compare the header in front of a part with the directory; it must lie before the position `end`."""
    file.seek(entry.header_offset)
    header = file.read(30)
    name = file.read(int.from_bytes(header[26:28], "little"))
    extra = file.read(int.from_bytes(header[28:30], "little"))
    if not header.startswith(b"PK\x03\x04") or name != entry.orig_filename.encode():
        raise ValueError(f"{entry.filename} is not where the directory says")
    while extra:  # fields of a name, a length, and as many bytes: torch moves tensors to round positions with one
        length = 4 + int.from_bytes(extra[2:4], "little")
        if length > len(extra):
            raise ValueError(f"the header of {entry.filename} is damaged")
        extra = extra[length:]
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise ValueError(f"{entry.filename} is compressed, which torch.save never does")
    if entry.external_attr & _IS_A_FOLDER:
        raise ValueError(f"{entry.filename} is said to be a folder")
    data_end = file.tell() + entry.file_size
    if data_end > end:
        raise ValueError(f"{entry.filename} reaches into what follows it")
    is_tensor = "/data/" in entry.filename
    if not is_tensor and entry.CRC and zlib.crc32(file.read(entry.file_size)) != entry.CRC:  # 0: not computed
        raise ValueError(f"{entry.filename} is not what it was when it was written")
    file.seek(data_end)
    if entry.flag_bits & _SIZES_FOLLOW and file.read(4) != b"PK\x07\x08":
        raise ValueError(f"{entry.filename} does not end where the directory says")


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
                shape = [_count(n) for n in entry["shape"]]
                entries[name] = _SAFETENSORS_DTYPES[entry["dtype"]], shape, start + _count(begin), start + _count(end)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has an entry that is not valid in a safetensors header: {error!r}") from error
    last = max((end for *_, end in entries.values()), default=start)
    if last > size:
        raise ValueError(f"{path} is cut off: it has {size:,} bytes, its header says {last:,}; fetch it again")
    position = start
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: the size of {name!r} does not fit its shape {shape}; the file is damaged")
        if begin != position:  # as the format demands
            raise ValueError(f"{path}: {name!r} does not begin where the tensor before it ends; the file is damaged")
        position = end
    if position != size:
        raise ValueError(f"{path} has {size - position:,} bytes more than its header says; the file is damaged")

    raw = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    state = {}
    for name, (dtype, shape, begin, end) in entries.items():
        data = raw[begin:end]
        if begin % dtype.itemsize:  # old writers did not align
            data = data.clone()
        state[name] = data.view(dtype).reshape(shape)
    return state


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"expected a number of elements or bytes, got {value!r}")
    return value


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header and the position of the first data byte."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(path.stat().st_size - 8, _MAX_SAFETENSORS_HEADER):
            raise ValueError(f"{path} is cut off inside its header, or is no safetensors file; fetch it again")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
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
            names = sorted(set(read_json(index)["weight_map"].values()))
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
    config = read_json(path)
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

    Raises:
        ValueError: a file is damaged or missing.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    metadata = read_dcp_metadata(folder)

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            metadata.storage_meta = dcp.metadata.StorageMeta(load_id=self.load_id)
            return metadata

    entries = {name: metadata.state_dict_metadata[name] for name in names}
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
        try:
            dcp.load(state, storage_reader=Reader(folder), no_dist=True)
        except CheckpointException as error:  # no `Exception`
            reason, _ = next(iter(error.failures.values()))
            raise ValueError(f"{folder} is damaged: {_first_line(reason)}") from error
    return state


_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined, unused-ignore]


class _IndexUnpickler(_PythonUnpickler):
    """Reads the index of a DCP folder; any global that such an index does not need is refused.

    It is the unpickler in Python: the one in C reserves whatever memory a damaged index speaks of.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def load_build(self) -> None:
        """Give an object its content; classes and functions keep theirs."""
        if callable(self.stack[-2]):
            raise pickle.UnpicklingError("an index that changes a class is none")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

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
    content = path.read_bytes()
    try:
        metadata = _IndexUnpickler(io.BytesIO(content)).load()
        _check_index(metadata)
    except Exception as error:  # a damaged pickle can make an unpickler raise anything
        raise ValueError(f"{path} is damaged, or not the index of a checkpoint: {_first_line(error)}") from error
    return metadata


def _check_index(metadata: Any) -> None:
    """Refuse an index that isn't one, that names files elsewhere, or whose tensors have gaps."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

    if not isinstance(metadata, Metadata):
        raise ValueError(f"it holds {type(metadata).__name__}")
    n_stored: Counter[str] = Counter()
    for index, part in metadata.storage_data.items():
        name = part.relative_path
        if not isinstance(name, str) or name != Path(name).name:
            raise ValueError(f"it names the file {name!r}")
        if _count(part.offset) + _count(part.length) >= 1 << 60:
            raise ValueError(f"part of {name} is said to be at {part.offset}")
        compressed = getattr(part, "transform_descriptors", None)
        n_stored[index.fqn] += (1 << 60) if compressed else part.length
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            continue
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{name!r} is {type(entry).__name__}")
        n_elements = 0
        for chunk in entry.chunks:
            inside = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
            if not all(begin >= 0 and length >= 0 and begin + length <= size for begin, length, size in inside):
                raise ValueError(f"{name} {list(entry.size)} has a part outside: {chunk}")
            n_elements += math.prod(chunk.sizes)
        if n_elements != math.prod(entry.size):
            raise ValueError(f"{name} {list(entry.size)} has parts of {n_elements} elements in all")
        if n_stored[name] < n_elements * entry.properties.dtype.itemsize:
            raise ValueError(f"{name} {list(entry.size)} is stored in {n_stored[name]} bytes")
