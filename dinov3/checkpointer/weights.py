"""The one door through which weights come in: read any known file, load it strictly, report what matched.

`read_weights` turns a path, an address or a name into a state dict with Meta's names; `load_weights` puts a state dict
into a module and never leaves it half loaded unless the keys concerned were named. Where files lie is the business of
`sources.py`, their formats of `files.py`, the names in them of `layouts.py`. Needs torch alone.
"""

import fnmatch
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dinov3.checkpointer.files import dcp_shapes, is_dcp, read_config, read_dcp, read_file, read_folder
from dinov3.checkpointer.layouts import to_meta
from dinov3.checkpointer.sources import local_path
from dinov3.utils.modules import unwrapped_name

logger = logging.getLogger("dinov3")

# Networks of a training run, the ones to take first in front: the trained model is the moving average of the student.
NETWORKS = ("model_ema", "teacher", "student", "gram_teacher")
_CONTAINERS = ("model", "state_dict")


def read_weights(
    source: str | os.PathLike[str],
    *,
    part: str = "backbone",
    network: str | None = None,
    container: str | None = None,
    like: nn.Module | None = None,
    check_hash: bool | None = None,
    round_periods: bool = True,
) -> dict[str, Tensor]:
    """The weights in a file or folder, in one layout: the names of `dinov3.models`.

    Known kinds, told apart by content and never by name: Meta's released backbones; teacher checkpoints
    (`{"teacher": {"backbone.…"}}`); folders of `torch.distributed.checkpoint` (exports of a teacher, and whole
    training checkpoints); Hugging Face folders and safetensors files; timm files. No code in a file is ever run.
    Tensors are on the CPU, and mapped into memory where the format allows: copy them before the file changes.

    Args:
        source: a path (`~` is expanded), a `file://` or `http(s)://` address (downloaded once), or the name of a
            repository in the local Hugging Face cache (`facebook/dinov3-…`).
        part: `"backbone"`: the backbone's own keys; another part (`"dino_head"`, `"ibot_head"`): that part's own
            keys; `"all"`: every part, each key behind the name of its part (`backbone.…`, `dino_head.…`), as training
            holds them. A file without parts is a backbone.
        network: which network of a training checkpoint: `"model_ema"`, `"teacher"`, `"student"` or `"gram_teacher"`;
            None: the first of the first three that is there. A file of a single network needs no name.
        container: an entry of a file to look into first, if it is there; entries of the usual names are found without.
        like: the backbone the weights are meant for. Needed only for Hugging Face and timm files of models unlike the
            released ones; see `layouts.to_meta`.
        check_hash: see `sources.local_path`.
        round_periods: for Hugging Face and timm files, which hold no RoPE periods: as in Meta's files (rounded to
            bfloat16), or exact.

    Raises:
        FileNotFoundError, sources.DownloadError: there is nothing at `source`; the message says where weights can be
            had.
        ValueError: it isn't a weight file, is damaged or incomplete, or doesn't have the part or network asked for.
    """
    state, config = _read_flat(source, network, check_hash, container)
    parts = _split_parts(state)
    if "backbone" in parts:
        reference = None if like is None else like.state_dict()
        parts["backbone"] = to_meta(parts["backbone"], config=config, like=reference, round_periods=round_periods)
    if part == "all":
        return {f"{name}.{key}": value for name, entries in parts.items() for key, value in entries.items()}
    if part not in parts:
        raise ValueError(f"{os.fspath(source)} has no {part!r}; its parts are: {', '.join(parts)}")
    return parts[part]


def read_state_dict(source: str | os.PathLike[str], *, check_hash: bool | None = None) -> dict[str, Tensor]:
    """The tensors of a file by their own names, for modules other than backbones (task heads).

    Wrapper names and the containers `teacher`, `model` and `state_dict` are removed, as in `read_weights`; nothing
    else.
    """
    return _read_flat(source, None, check_hash)[0]


def _read_flat(
    source: str | os.PathLike[str], network: str | None, check_hash: bool | None, container: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One network's tensors by name, and the `config.json` that came with them."""
    if network is not None and network not in NETWORKS:
        raise ValueError(f"unknown network {network!r}; expected one of {', '.join(NETWORKS)}")
    path = local_path(source, check_hash=check_hash)
    config: dict[str, Any] = {}
    if is_dcp(path):
        names = [name.removeprefix("model.") for name in dcp_shapes(path) if name.startswith("model.")]
        if not names:
            raise ValueError(f"the checkpoint {path} holds no tensor named 'model.…'")
        prefix = _network_prefix(map(unwrapped_name, names), network, path)
        wanted = [name for name in names if unwrapped_name(name).startswith(prefix)]
        state = read_dcp(path, [f"model.{name}" for name in wanted])
        state = {unwrapped_name(name): state[f"model.{name}"] for name in wanted}
    else:
        content: Any
        if path.is_dir():
            content, config = read_folder(path)
        else:
            content = read_file(path)
            config = read_config(path.parent)
        if isinstance(content, Mapping) and isinstance(content.get(container), Mapping):
            content = content[container]
        state, found = _unwrap(content, network, path)
        if found is not None and network not in (None, found):
            raise ValueError(f"{path} has no network {network!r}; it has {found}")
        prefix = "" if found else _network_prefix(state, network, path)
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}, config


def _unwrap(content: Any, network: str | None, path: object) -> tuple[dict[str, Tensor], str | None]:
    """The state dict inside the containers of a checkpoint file, and the network that a container named."""
    found = None
    while True:
        if not isinstance(content, Mapping) or not content:
            held = type(content).__name__ if content else "nothing"
            raise ValueError(f"{path} holds {held}, expected tensors by name")
        if all(isinstance(value, Tensor) for value in content.values()):
            return {unwrapped_name(key): value for key, value in content.items()}, found
        wanted = (network,) if network and network in content else (*NETWORKS[:3], *_CONTAINERS)
        name = next((name for name in wanted if isinstance(content.get(name), Mapping)), None)
        if name is None:
            others = [key for key, value in content.items() if not isinstance(value, Tensor)]
            raise ValueError(
                f"{path} is no state dict: {', '.join(map(repr, others[:6]))} are not tensors, and none of the entries "
                f"{', '.join((*NETWORKS[:3], *_CONTAINERS))} is there"
            )
        content, found = content[name], name if name in NETWORKS else found


def _network_prefix(keys: Iterable[str], network: str | None, path: object) -> str:
    """`"<network>."` if the keys are those of a whole training run, else `""`."""
    first = {key.partition(".")[0] for key in keys}
    present = [name for name in NETWORKS if name in first]
    if network is None and not present:
        return ""
    if network is not None and network not in present:
        raise ValueError(f"{path} has no network {network!r}; it has {', '.join(present) or 'a single, unnamed one'}")
    return f"{network or present[0]}."


def _split_parts(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The state dict by the first word of its keys if one part is called backbone, else all of it as the backbone."""
    if not any(key.startswith("backbone.") for key in state):
        return {"backbone": state}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, rest = key.partition(".")
        parts.setdefault(name, {})[rest] = value
    return parts


# --- Loading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did, or why it did nothing.

    Attributes:
        matched: number of tensors loaded.
        missing: keys of the module that the state dict lacks; after loading, only such as were allowed.
        unexpected: keys of the state dict that the module lacks; likewise.
        misshapen: key -> (shape in the state dict, shape in the module).
    """

    matched: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.matched} tensors match"]
        for title, keys in (("missing", self.missing), ("unexpected", self.unexpected)):
            if keys:
                lines.append(f"{len(keys)} {title}: {_listed(keys)}")
        if self.misshapen:
            shapes = [f"{key} {list(got)} (the model has {list(want)})" for key, (got, want) in self.misshapen.items()]
            lines.append(f"{len(shapes)} of another shape: {_listed(shapes)}")
        return "; ".join(lines)


def load_weights(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    assign: bool = False,
) -> LoadReport:
    """Copy a state dict into a module, all of it or nothing.

    Args:
        module: on any device but meta, unless `assign` is True and no key may be missing.
        state: as from `read_weights`.
        allow_missing: keys that `state` may lack (they keep their values), each a whole key, the name of a
            sub-module, or a pattern with `*`.
        allow_unexpected: keys of `state` to ignore, written in the same way.
        assign: use the tensors of `state` themselves, which needs no more memory.

    Returns:
        What matched, and which of the allowed keys were missing or ignored.

    Raises:
        ValueError: anything else differs in name or shape, or nothing matches. The module is unchanged; the message
            holds the report.
    """
    own = module.state_dict()
    on_meta = [key for key, value in own.items() if value.is_meta]
    if on_meta and not assign:
        raise ValueError(f"the module is on the meta device ({on_meta[0]}, …): call to_empty(device=…) before loading")
    common = [key for key in own if key in state]
    shapes = {key: (tuple(state[key].shape), tuple(own[key].shape)) for key in common}
    misshapen = {key: (got, want) for key, (got, want) in shapes.items() if got != want}
    missing = tuple(key for key in own if key not in state)
    unexpected = tuple(key for key in state if key not in own)
    report = LoadReport(len(common) - len(misshapen), missing, unexpected, misshapen)

    allow_missing, allow_unexpected = _patterns(allow_missing), _patterns(allow_unexpected)
    refused = [key for key in missing if not _is_allowed(key, allow_missing)]
    refused += [key for key in unexpected if not _is_allowed(key, allow_unexpected)]
    if refused or misshapen or not report.matched:
        raise ValueError(f"the weights do not fit {type(module).__name__}, nothing was loaded: {report}")
    module.load_state_dict({key: state.get(key, value) for key, value in own.items()}, strict=True, assign=assign)
    if missing or unexpected:
        logger.info("Loaded weights into %s: %s", type(module).__name__, report)
    return report


def _patterns(allowed: Iterable[str]) -> tuple[str, ...]:
    if isinstance(allowed, str):
        raise TypeError(f"got the string {allowed!r} for allowed keys, expected a list of them")
    return tuple(allowed)


def _is_allowed(key: str, patterns: tuple[str, ...]) -> bool:
    return any(key.startswith(f"{p.removesuffix('.')}.") or fnmatch.fnmatchcase(key, p) for p in patterns)


def _listed(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f", … and {len(names) - limit} more" if len(names) > limit else "")
