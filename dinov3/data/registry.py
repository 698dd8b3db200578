"""Dataset strings: `Name[:key=value]*`, and the datasets they can name.

A value that holds `:` or `=` is put in double quotes: `ImageFolder:root="C:/my images"`.

A class of your own is named by its module, `my.module:MyDataset:root=/data`, or by a name that `register_dataset` gives
it. It is called with the keys of the string and with `transform`, `target_transform` and `transforms`; its items are
(image, target). The text of a key is converted to the type that the constructor annotates: `int`, `float`, `bool`.
"""

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from dinov3.data.datasets import (
    ADE20K,
    NYU,
    CaptionList,
    CocoCaptions,
    CocoDetection,
    DepthFolder,
    HuggingFaceDataset,
    ImageFolder,
    ImageList,
    ImageNet,
    ImageNet22k,
    ImageNetC,
    ImageNetReaL,
    ImageNetSketch,
    ImageNetSubset,
    ImageNetV2,
    ObjectNet,
    SegmentationFolder,
    WebDataset,
    WebDatasetCaptions,
)

# Accepted in every string, as in the published code; `DatasetEntry.check` tells whether the dataset takes them.
_COMMON_KEYS = ("root", "extra", "split")
_TRANSFORMS = ("transform", "target_transform", "transforms")
_PART = re.compile(r'(?:[^":]|"[^"]*")+')
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_QUOTED = re.compile(r'"[^"]*"')


@dataclass(frozen=True)
class DatasetEntry:
    """A dataset that strings can name.

    Attributes:
        build: the class, called with the keys as keyword arguments (and the transforms).
        keys: the keys it takes; None: any.
        required: those that must be given.
        split: enumeration whose member names are the values of `split`; None: `split` is passed on as text.
        converters: key -> function of its text, for values that aren't text.
    """

    build: Callable[..., Any]
    keys: tuple[str, ...] | None
    required: tuple[str, ...]
    split: type[Enum] | None = None
    converters: dict[str, Callable[[str], Any]] = field(default_factory=dict)


# What every `ImageCollection` takes.
_COLLECTION_KEYS = ("on_error", "channels", "max_value")
_COLLECTION_TYPES: dict[str, Callable[[str], Any]] = {"channels": int, "max_value": float}


def _collection(build: Callable[..., Any], *keys: str, required: str = "root") -> DatasetEntry:
    return DatasetEntry(build, (*keys, *_COLLECTION_KEYS), (required,), converters=_COLLECTION_TYPES)


# What every `PairFolder` takes.
_PAIR_KEYS = ("root", "split", "images", "annotations", "ending", "unmatched")


def _test_set(build: Callable[..., Any], *keys: str) -> DatasetEntry:
    converters: dict[str, Callable[[str], Any]] = {"restrict": _as_bool, "border": int}
    return DatasetEntry(build, ("root", *keys, "index_cache", "on_error"), ("root",), converters=converters)


def _as_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


_REGISTRY: dict[str, DatasetEntry] = {
    "ImageNet": DatasetEntry(ImageNet, ("split", "root", "extra"), ("split", "root", "extra"), ImageNet.Split),
    "ImageNet22k": DatasetEntry(ImageNet22k, ("root", "extra"), ("root", "extra")),
    "ADE20K": DatasetEntry(ADE20K, ("split", "root"), ("split", "root"), ADE20K.Split),
    "NYU": DatasetEntry(NYU, ("split", "root"), ("split", "root"), NYU.Split),
    "CocoCaptions": DatasetEntry(CocoCaptions, ("split", "root"), ("split", "root"), CocoCaptions.Split),
    "CocoDetection": DatasetEntry(CocoDetection, ("root", "split", "annotations", "images"), ("root",)),
    "ImageFolder": _collection(ImageFolder, "root", "split", "index_cache"),
    "ImageList": _collection(ImageList, "file", "root", "image_column", "label_column", required="file"),
    "DepthFolder": DatasetEntry(
        DepthFolder,
        (*_PAIR_KEYS, "scale", "invalid", "mask_ending"),
        ("root",),
        converters={"scale": float, "invalid": float},
    ),
    "SegmentationFolder": DatasetEntry(
        SegmentationFolder, (*_PAIR_KEYS, "ignore_index"), ("root",), converters={"ignore_index": int}
    ),
    "CaptionList": _collection(CaptionList, "file", "root", "image_column", "caption_column", required="file"),
    "WebDataset": _collection(WebDataset, "root", "label", "index_cache"),
    "WebDatasetCaptions": _collection(WebDatasetCaptions, "root", "label", "index_cache"),
    "HuggingFace": _collection(HuggingFaceDataset, "root", "split", "image_column", "label_column"),
    "ImageNetReaL": _test_set(ImageNetReaL, "real"),
    "ImageNetV2": _test_set(ImageNetV2),
    "ImageNetA": _test_set(ImageNetSubset, "labels", "restrict"),
    "ImageNetR": _test_set(ImageNetSubset, "labels", "restrict"),
    "ImageNetSketch": _test_set(ImageNetSketch, "labels"),
    "ImageNetC": _test_set(ImageNetC, "labels"),
    "ObjectNet": _test_set(ObjectNet, "restrict", "border"),
}


def register_dataset(
    name: str,
    build: Callable[..., Any],
    *,
    keys: Iterable[str] = ("root",),
    required: Iterable[str] = (),
    split: type[Enum] | None = None,
    converters: dict[str, Callable[[str], Any]] | None = None,
) -> None:
    """Let dataset strings name a dataset of your own.

    Args:
        name: how strings begin; letters, digits and `_`.
        build: class or function called with the given keys and with `transform`, `target_transform`, `transforms`.
        keys, required, split, converters: see `DatasetEntry`.

    Raises:
        ValueError: a name that is taken or can't be written in a string, or required keys that aren't keys.
    """
    if not name.isidentifier() or name in _REGISTRY:
        raise ValueError(
            f"cannot register dataset {name!r}: the name is taken, or holds other than letters, digits and _"
        )
    if missing := set(required) - set(keys):
        raise ValueError(f"cannot register dataset {name!r}: required keys {sorted(missing)} are not among its keys")
    _REGISTRY[name] = DatasetEntry(build, tuple(keys), tuple(required), split, dict(converters or {}))


def dataset_names() -> list[str]:
    """The names that dataset strings can begin with."""
    return list(_REGISTRY)


def as_dataset_str(data: str | Path) -> str:
    """The dataset string of a folder of images; a dataset string as it is.

    Raises:
        FileNotFoundError: neither.
    """
    text = str(data)
    if Path(text).expanduser().is_dir():
        return with_root("ImageFolder", text)
    if text.split(":")[0] in dataset_names() or (":" in text and not Path(text).is_absolute()):
        return text
    raise FileNotFoundError(f"{text} is no folder, and no dataset string (Name:key=value; docs/data.md)")


def with_root(dataset_str: str, root: str) -> str:
    """`dataset_str` with the key `root`, quoted where needed; as it is if it has one of its own."""
    if has_root(dataset_str):
        return dataset_str
    return f'{dataset_str}:root="{root}"' if set(root) & set(":=") else f"{dataset_str}:root={root}"


def has_root(dataset_str: str) -> bool:
    """Whether a dataset string says where its data are."""
    return any(part.startswith("root=") for part in dataset_str.split(":"))


def parse_dataset_str(dataset_str: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a dataset string; `split` becomes the member of the dataset's enumeration.

    Raises:
        ValueError: unknown name, or a part that isn't `key=value`.
        AssertionError: unknown key (the exception type is contract).
        KeyError: unknown split.
    """
    name, entry, parts = _find_entry(dataset_str)
    kwargs: dict[str, Any] = {}
    for part in parts:
        key, value = _key_and_value(part, dataset_str)
        if entry.keys is not None and key not in entry.keys and key not in _COMMON_KEYS:
            raise AssertionError(
                f"unknown key {key!r} in {dataset_str!r}{_nearest(key, entry.keys)}; "
                f"keys of {name}: {', '.join(entry.keys)}"
            )
        kwargs[key] = _convert(name, entry, key, value)
    return name, kwargs


def check_dataset_str(dataset_str: str) -> tuple[DatasetEntry, dict[str, Any]]:
    """The entry that a string names, and all the arguments it needs; the data need not be there.

    Raises:
        TypeError: the dataset doesn't take a key, or needs one that isn't there; besides those of `parse_dataset_str`.
    """
    name, kwargs = parse_dataset_str(dataset_str)
    entry = entry_of(name)
    if unused := [key for key in kwargs if entry.keys is not None and key not in entry.keys]:
        keys = ", ".join(entry.keys or ())
        raise TypeError(f"dataset {name} has no {unused[0]!r} (in {dataset_str!r}); its keys: {keys}")
    if missing := [key for key in entry.required if key not in kwargs]:
        example = ":".join([name, *(f"{key}=<{key.upper()}>" for key in entry.required)])
        raise TypeError(f"dataset {name} needs {' and '.join(missing)} (in {dataset_str!r}): write {example}")
    return entry, kwargs


def build_dataset(dataset_str: str, **transforms: Any) -> Any:
    """The dataset that a string names.

    Args:
        dataset_str: see `parse_dataset_str`.
        **transforms: `transform`, `target_transform`, `transforms`.

    Raises:
        TypeError, ValueError, AssertionError, KeyError: see `check_dataset_str`.
    """
    entry, kwargs = check_dataset_str(dataset_str)
    return entry.build(**kwargs, **transforms)


def entry_of(name: str) -> DatasetEntry:
    """The entry of a known name, or of `module:Class`."""
    return _REGISTRY[name] if name in _REGISTRY else _entry_of_class(*name.split(":"))


def _find_entry(dataset_str: str) -> tuple[str, DatasetEntry, list[str]]:
    """Name, entry, and the parts after the name."""
    name, *parts = _split_outside_quotes(dataset_str)
    if name in _REGISTRY:
        return name, _REGISTRY[name], parts
    if parts and parts[0].isidentifier() and _MODULE.fullmatch(name):
        return f"{name}:{parts[0]}", _entry_of_class(name, parts[0]), parts[1:]
    raise ValueError(
        f"unknown dataset {name!r} in {dataset_str!r}{_nearest(name, _REGISTRY)}; "
        f"known datasets: {', '.join(_REGISTRY)}; a class of your own is <module>:<Class>"
    )


def _entry_of_class(module: str, name: str) -> DatasetEntry:
    """The entry of a class that isn't registered, from the signature of its constructor."""
    try:
        build = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the module itself needs
        raise ValueError(
            f"unknown dataset {f'{module}:{name}'!r}{_nearest(module, _REGISTRY)}: there is no module {module!r} on "
            f"PYTHONPATH, and the known datasets are {', '.join(_REGISTRY)}"
        ) from error
    if not callable(build):
        raise ValueError(f"unknown dataset {f'{module}:{name}'!r}: module {module!r} has no class {name!r}")
    parameters = inspect.signature(build).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in _TRANSFORMS]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return DatasetEntry(
        build,
        keys=None if takes_any else tuple(p.name for p in named),
        required=tuple(p.name for p in named if p.default is p.empty),
        converters={p.name: convert for p in named if (convert := _converter(p.annotation)) is not None},
    )


def _converter(annotation: Any) -> Callable[[str], Any] | None:
    """From text to what a parameter is annotated with; optional types count as what they hold."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    kinds = {kind.strip() for kind in text.split("|")} - {"None"}
    return _CONVERTERS.get(kinds.pop()) if len(kinds) == 1 else None


_CONVERTERS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": _as_bool}


def _split_outside_quotes(dataset_str: str) -> list[str]:
    if dataset_str.count('"') % 2:
        raise ValueError(f"dataset string {dataset_str!r} has a quote that isn't closed")
    parts, position = [], 0
    while position <= len(dataset_str):
        match = _PART.match(dataset_str, position)
        parts.append(match.group() if match else "")
        position += len(parts[-1]) + 1
    return parts


def _key_and_value(part: str, dataset_str: str) -> tuple[str, str]:
    if _QUOTED.sub("", part).count("=") != 1:
        raise ValueError(
            f"{part!r} in {dataset_str!r} must be key=value; put a value that holds ':' or '=' in double quotes: "
            'root="C:/images"'
        )
    key, value = part.split("=", 1)
    return key, value.replace('"', "")


def _convert(name: str, entry: DatasetEntry, key: str, value: str) -> Any:
    if key == "split" and entry.split is not None:
        members = entry.split.__members__
        if value not in members:
            raise KeyError(
                f"unknown split {value!r} of {name}{_nearest(value.upper(), members)}; splits: {', '.join(members)}"
            )
        return members[value]
    try:
        return entry.converters.get(key, str)(value)
    except ValueError as error:
        raise ValueError(f"{key}={value} of dataset {name}: {error}") from error


def _nearest(word: str, known: Iterable[str]) -> str:
    """A question with the known word that looks most like this one, or nothing."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[found[0]]!r}?)" if found else ""
