"""Features as files: their layout, the writer that can go on where it was stopped, and the data set that reads them.

A folder of features holds `features.json`, which says what they are, and per shard a file of features and one of
samples (Parquet has both in one file). Rows are in the order of the data set; images that couldn't be read have none.

    features-00003-of-00120.safetensors   `features` [n, D] or [n, P, D];  .npy: the same as an array
    samples-00003-of-00120.csv            columns index, name, label;      .parquet: these and `features`

A shard is complete when its file of features is there: that one is written last, under another name first.
"""

import csv
import io
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dinov3 import distributed
from dinov3.checkpointer.export import write_safetensors
from dinov3.checkpointer.files import read_safetensors
from dinov3.data.registry import parse_dataset_str, register_dataset
from dinov3.utils.dtype import as_torch_dtype
from dinov3.utils.files import atomically, read_json, read_text

logger = logging.getLogger("dinov3")

FORMATS = ("safetensors", "npy", "parquet")
_MANIFEST = "features.json"
_DATASET_NAME = "Features"


class Tokens(Enum):
    """What a row of features holds; see `features.py`."""

    CLS = "cls"
    MEAN = "mean"
    CLS_MEAN = "cls_mean"
    PATCHES = "patches"


@dataclass(frozen=True)
class FeatureRequest:
    """What features were asked for; as it stands in `features.json`.

    Attributes:
        dataset: folder or dataset string.
        count: images of it.
        model: where the model comes from, with size and date of a file of weights.
        tokens: name of a member of `Tokens`.
        widths: of the class token of each layer.
        transform: sizes of the images.
        format, dtype: of the files.
        shard_size: images per shard.
    """

    dataset: str
    count: int
    model: Mapping[str, Any]
    tokens: str
    widths: Sequence[int]
    transform: Mapping[str, int]
    format: str
    dtype: str
    shard_size: int

    @classmethod
    def of(cls, config: Any, count: int, widths: Sequence[int]) -> "FeatureRequest":
        """From a `FeaturesConfig`.

        Raises:
            ValueError: an unknown format or dtype, or a shard size below 1.
        """
        if config.format not in FORMATS:
            raise ValueError(f"format={config.format!r}: expected one of {', '.join(FORMATS)}")
        if as_torch_dtype(config.dtype) not in (torch.float32, torch.float16):
            raise ValueError(f"dtype={config.dtype!r}: expected fp32 or fp16")
        if config.shard_size < 1:
            raise ValueError(f"shard_size={config.shard_size}: expected at least 1")
        model = asdict(config.model)
        weights = Path(config.model.pretrained_weights or "")
        if weights.is_file():  # the newest export of a training has one name: features of two must not be mixed
            model |= {"size": weights.stat().st_size, "modified_ns": weights.stat().st_mtime_ns}
        return cls(
            dataset=config.dataset,
            count=count,
            model=model,
            tokens=config.tokens.name,
            widths=list(widths),
            transform=asdict(config.transform),
            format=config.format,
            dtype=config.dtype,
            shard_size=config.shard_size,
        )


class FeatureWriter:
    """Writes the shards of a folder.

    Args:
        folder: made if needed.
        request: what is written.
        dataset: gives labels (`get_target`) and names (`get_image_relpath`), where it has them, and `class_names`.

    Raises:
        ValueError: the folder holds features that were asked for differently.
    """

    def __init__(self, folder: str | os.PathLike[str], request: FeatureRequest, dataset: Any) -> None:
        self.folder, self.request = Path(folder or "."), request
        self.n_shards = -(-request.count // request.shard_size)
        self._target = getattr(dataset, "get_target", lambda index: None)
        self._name = getattr(dataset, "get_image_relpath", str)
        self._kept: dict[int, Tensor | None] = {}
        self._start(list(getattr(dataset, "class_names", ())))

    def _start(self, class_names: list[str]) -> None:
        manifest = {"request": json.loads(json.dumps(asdict(self.request))), "class_names": class_names}
        path = self.folder / _MANIFEST
        if path.exists():
            earlier, _ = _read_manifest(path)
            if differing := [key for key, value in manifest["request"].items() if earlier.get(key) != value]:
                raise ValueError(
                    f"{self.folder} holds other features, which differ in {', '.join(differing)} (see {path}): write "
                    "to another folder, or delete this one"
                )
        elif distributed.is_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(path, json.dumps(manifest, indent=2) + "\n")

    def rows(self, shard: int) -> range:
        """Positions in the data set of a shard's images."""
        size = self.request.shard_size
        return range(shard * size, min((shard + 1) * size, self.request.count))

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that are not complete."""
        return [shard for shard in range(self.n_shards) if not self._path("features", shard).exists()]

    def add(self, row: int, vector: Tensor | None) -> None:
        """Add the features of an image, None if it couldn't be read; the last one of a shard writes it."""
        shard = row // self.request.shard_size
        self._kept[row] = vector
        rows = self.rows(shard)
        if row == rows[-1]:
            self._write_shard(shard, [self._kept.pop(r) for r in rows])

    def finish(self) -> None:
        """Check that all shards are there.

        Raises:
            RuntimeError: some are missing.
        """
        if missing := self.missing_shards():
            raise RuntimeError(f"{self.folder}: {len(missing)} of {self.n_shards} shards are missing")
        logger.info("features of %d images: %d shards in %s", self.request.count, self.n_shards, self.folder)

    def _path(self, kind: str, shard: int) -> Path:
        suffix = self.request.format if kind == "features" else "csv"
        return self.folder / f"{kind}-{shard:05d}-of-{self.n_shards:05d}.{suffix}"

    def _write_shard(self, shard: int, vectors: Sequence[Tensor | None]) -> None:
        readable = [(row, v) for row, v in zip(self.rows(shard), vectors, strict=True) if v is not None]
        rows = [row for row, _ in readable]
        dtype = as_torch_dtype(self.request.dtype)
        # A shard of nothing but unreadable images is a file too.
        features = torch.stack([v for _, v in readable]).to(dtype) if readable else torch.empty(0, 0, dtype=dtype)
        samples: dict[str, list[Any]] = {
            "index": rows,
            "name": [self._name(row) for row in rows],
            "label": [_as_json(self._target(row)) for row in rows],
        }
        path = self._path("features", shard)
        if self.request.format == "parquet":
            _write_parquet(path, features, samples)
        else:
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(samples)
            writer.writerows(zip(*samples.values(), strict=True))
            _write(self._path("samples", shard), text.getvalue())
            if self.request.format == "npy":
                with atomically(path) as temporary, open(temporary, "wb") as file:
                    np.save(file, features.numpy())
            else:
                write_safetensors({"features": features}, path)
        logger.info("%s: %d images", path.name, len(rows))


def _as_json(target: Any) -> str:
    """A label as text: a number, a list of numbers, or nothing."""
    if target is None or target == ():
        return ""
    plain = target.tolist() if hasattr(target, "tolist") else target
    return json.dumps(plain)


def _write(path: Path, text: str) -> None:
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _write_parquet(path: Path, features: Tensor, samples: Mapping[str, list[Any]]) -> None:
    pyarrow, parquet = _pyarrow()
    labels: list[Any] = [json.loads(text) if text else None for text in samples["label"]]
    if not all(label is None or isinstance(label, int) for label in labels):
        labels = [text or None for text in samples["label"]]
    flat = features.flatten(1).numpy()
    columns = {
        "index": pyarrow.array(samples["index"], pyarrow.int64()),
        "name": pyarrow.array(samples["name"], pyarrow.string()),
        "label": pyarrow.array(labels) if any(label is not None for label in labels) else pyarrow.nulls(len(labels)),
        "features": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat.reshape(-1)), max(flat.shape[1], 1)),
    }
    # The shape of a row, which a list of numbers doesn't tell.
    table = pyarrow.table(columns).replace_schema_metadata({"shape": json.dumps(list(features.shape[1:]))})
    with atomically(path) as temporary:
        parquet.write_table(table, temporary)


def _read_parquet(path: Path) -> tuple[Tensor, list[dict[str, Any]]]:
    _, parquet = _pyarrow()
    table = parquet.read_table(path)
    table.validate(full=True)
    if len(table) != (n_rows := parquet.read_metadata(path).num_rows):  # PyArrow believes what groups of rows say
        raise ValueError(f"{len(table)} rows of {n_rows} were found")
    shape = json.loads(table.schema.metadata[b"shape"])
    values = table.column("features").combine_chunks()
    features = torch.from_numpy(values.flatten().to_numpy(zero_copy_only=False).copy()).view(len(table), *shape)
    samples = table.select(["index", "name", "label"]).to_pylist()
    for sample in samples:
        if isinstance(sample["label"], str):
            sample["label"] = json.loads(sample["label"])
    return features, samples


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install 'dinov3[formats]'") from error
    return pyarrow, pyarrow.parquet


class FeatureFiles(Dataset[tuple[Tensor, Any]]):
    """The rows of a folder of features, with their labels: `Features:root=<FOLDER>`.

    Items are (features, float32, `[D]` or `[P, D]`; target). Features are mapped into memory where the format allows.

    Args:
        root: the folder.
        transforms, transform: of images; they have no effect.
        target_transform: of targets.

    Attributes:
        request: what was asked for (`FeatureRequest`), as a dictionary.
        class_names: of the data set that the features are of; empty if it has none.

    Raises:
        FileNotFoundError: no features there.
        ValueError: they are not complete.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        del transforms, transform
        folder = Path(root).expanduser()
        if not (folder / _MANIFEST).is_file():
            raise FileNotFoundError(
                f"{folder} holds no features: {_MANIFEST} is missing (python -m dinov3.eval.features)"
            )
        self.root = folder
        self.request, self.class_names = _read_manifest(folder / _MANIFEST)
        self.target_transform = target_transform
        self.transform = self.transforms = None
        n_shards = -(-self.request["count"] // self.request["shard_size"])
        files: list[Path] = []
        for i in range(n_shards):  # no list of names first: a damaged manifest may speak of any number
            files.append(folder / f"features-{i:05d}-of-{n_shards:05d}.{self.request['format']}")
            if not files[-1].is_file():
                raise ValueError(
                    f"shards of {folder} are missing, the first is {files[-1].name}: run the command that wrote it "
                    "again, it goes on"
                )
        count, size = self.request["count"], self.request["shard_size"]
        rows = [range(i * size, min((i + 1) * size, count)) for i in range(n_shards)]
        shards = [_read_shard(file, own) for file, own in zip(files, rows, strict=True)]
        self._features = [features for features, _ in shards]
        samples = [sample for _, rows in shards for sample in rows]
        self._names = [sample["name"] for sample in samples]
        self._targets = [sample["label"] for sample in samples]
        self._ends = list(accumulate(len(features) for features in self._features))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range: there are {len(self)} rows")
        shard = bisect_right(self._ends, index)
        row = index - (self._ends[shard] - len(self._features[shard]))
        target = self._targets[index]
        if self.target_transform is not None:
            target = self.target_transform(target)
        return self._features[shard][row].float(), target

    def get_target(self, index: int) -> Any:
        """Label of a row, None without one."""
        return self._targets[index]

    def get_targets(self) -> Any:
        """Labels of all rows: int64 `[n]`, or a list of lists; None without labels."""
        if any(target is None for target in self._targets):
            return None
        return np.array(self._targets, dtype=np.int64) if isinstance(self._targets[0], int) else self._targets

    def get_image_relpath(self, index: int) -> str:
        """Name of the image of a row."""
        return self._names[index]


def _read_manifest(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What was asked for, and names of classes.

    Raises:
        ValueError: the file is damaged.
    """
    content = read_json(path)
    try:
        request, class_names = content["request"], content["class_names"]
        for key, largest in {"count": 1 << 48, "shard_size": 1 << 48}.items():
            if not isinstance(request[key], int) or not 1 <= request[key] <= largest:
                raise ValueError(f"{key} is {request[key]!r}")
        if request["format"] not in FORMATS or request["tokens"] not in Tokens.__members__:
            raise ValueError(f"format is {request['format']!r}, tokens is {request['tokens']!r}")
        if not all(isinstance(width, int) for width in request["widths"]):
            raise ValueError(f"widths is {request['widths']!r}")
        if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
            raise ValueError(f"class_names is {class_names!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say what the features beside it are: {error!r}") from error
    return request, class_names


def _read_shard(path: Path, rows: range) -> tuple[Tensor, list[dict[str, Any]]]:
    """Features and samples of the images that are rows of the data set.

    Raises:
        ValueError: a file is damaged, or the two don't belong together; the message names the file.
    """
    try:
        if path.suffix == ".parquet":
            features, samples = _read_parquet(path)
        else:
            samples = _read_samples(path.with_name(f"samples-{path.stem.partition('-')[2]}.csv"))
            if path.suffix == ".npy":
                array: Any = np.load(path, mmap_mode="c", allow_pickle=False)
                if array.offset + array.nbytes != path.stat().st_size:  # a header of another length moves all numbers
                    raise ValueError("its size does not fit its header")
                features = torch.from_numpy(array)
            else:
                features = read_safetensors(path)["features"]
    except Exception as error:  # damaged files can make their readers raise anything
        raise ValueError(f"{path} can't be read: {error!r}") from error
    indices = [sample["index"] for sample in samples]
    are_rows = all(isinstance(index, int) and index in rows for index in indices)
    if len(features) != len(samples) or not are_rows or indices != sorted(set(indices)):
        raise ValueError(
            f"{path} has {len(features)} rows of features, and {len(samples)} samples of the {len(rows)} images from "
            f"{rows.start} on: one of them is damaged, delete both and extract them anew"
        )
    return features, samples


def _read_samples(path: Path) -> list[dict[str, Any]]:
    text = read_text(path)
    if not text.endswith("\n"):
        raise ValueError(f"{path} is cut off")
    return [
        {"index": int(row["index"]), "name": row["name"], "label": json.loads(row["label"] or "null")}
        for row in csv.DictReader(io.StringIO(text, newline=""), strict=True)
    ]


register_dataset(_DATASET_NAME, FeatureFiles, keys=("root",), required=("root",))


def are_feature_files(dataset_str: Any) -> bool:
    """Whether a dataset string names features."""
    return isinstance(dataset_str, str) and dataset_str.partition(":")[0] == _DATASET_NAME


class StoredFeatures(nn.Module):
    """What stands in a model's place when data sets hold its features: it passes them on in the form that is wanted.

    Args:
        request: of the features.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        super().__init__()
        self.tokens, self.widths = Tokens[request["tokens"]], list(request["widths"])

    def forward(self, rows: Tensor) -> Tensor:
        """The rows `[B, D]` themselves.

        Raises:
            ValueError: they are patches.
        """
        if self.tokens is Tokens.PATCHES:
            raise ValueError("features of patches can't be used here: extract them with tokens=cls, mean or cls_mean")
        return rows

    def get_intermediate_layers(self, rows: Tensor, n: int = 1, **_: Any) -> list[tuple[Tensor, Tensor]]:
        """(mean patch token `[B, 1, D]`, class token `[B, D]`) of the last n layers; the mean is that of the last one.

        Raises:
            ValueError: the files don't hold these.
        """
        if self.tokens is not Tokens.CLS_MEAN or n > len(self.widths):
            raise ValueError(
                f"linear heads on the last {n} layers need features of tokens=cls_mean layers={n}; these have "
                f"tokens={self.tokens.value} layers={len(self.widths)}"
            )
        *class_tokens, mean = rows.split([*self.widths, self.widths[-1]], dim=1)
        return [(mean[:, None], class_token) for class_token in class_tokens[-n:]]


def stored_model(dataset_strs: Iterable[str | None]) -> StoredFeatures | None:
    """The stand-in for the model if these data sets are features; None if none of them is.

    Raises:
        ValueError: some are and some aren't, or they are of different kinds.
    """
    given = [name for name in dataset_strs if name is not None]
    stored = [name for name in given if are_feature_files(name)]
    if not stored:
        return None
    if len(stored) < len(given):
        raise ValueError(f"features and images can't be mixed: got {', '.join(given)}")
    requests = []
    for name in stored:
        path = Path(parse_dataset_str(name)[1]["root"]).expanduser() / _MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} holds no features: {_MANIFEST} is missing")
        requests.append(_read_manifest(path)[0])
    for name, request in zip(stored[1:], requests[1:], strict=True):
        for key in ("model", "tokens", "widths", "transform"):
            if request[key] != requests[0][key]:
                raise ValueError(
                    f"{stored[0]} and {name} differ in {key}: {requests[0][key]} and {request[key]}; features of one "
                    "kind are needed"
                )
    return StoredFeatures(requests[0])


def save_features_dict(features_dict: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write named tensors to a `.pt` or a `.npy` file, by the extension."""
    tensors = {name: tensor.detach().cpu() for name, tensor in features_dict.items()}
    if _extension(path) == ".pt":
        torch.save(tensors, path)
    else:
        arrays: Any = {name: tensor.numpy() for name, tensor in tensors.items()}
        np.save(path, arrays, allow_pickle=True)


def load_features_dict(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Read named tensors, to the CPU.

    Args:
        path: a file of `save_features_dict`.
        allow_pickle: needed for `.npy` files, which hold a pickled dictionary: reading one runs code that is in it, so
            only read files that you trust.

    Raises:
        ValueError: another extension, or a pickled file without `allow_pickle`.
    """
    if _extension(path) == ".pt":
        loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return loaded
    if not allow_pickle:
        raise ValueError(
            f"{path} is a pickled dictionary, and unpickling can run any code: if you trust the file, pass "
            "allow_pickle=True, and save it as .pt, which needs no pickle"
        )
    arrays = np.load(path, allow_pickle=True).item()
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _extension(path: str | os.PathLike[str]) -> str:
    extension = Path(path).suffix
    if extension not in (".pt", ".npy"):
        raise ValueError(f"features are stored as .pt or .npy, got {os.fspath(path)!r}")
    return extension
