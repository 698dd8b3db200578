"""How the hub makes a backbone: options and weights of a row of the table, as a user gave them -> a loaded module."""

import difflib
import inspect
import logging
import os
import re
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from torch import nn
from torch.overrides import TorchFunctionMode

from dinov3.checkpointer.weights import load_weights, read_weights
from dinov3.hub.registry import BACKBONES, NORMALIZATIONS, BackboneEntry, Weights
from dinov3.hub.transforms import make_transform
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger("dinov3")

# What `weights` may be; the annotation of the entry points.
WeightsLike = Weights | str | os.PathLike[str]


def load_backbone(
    name: str,
    *,
    pretrained: bool = True,
    weights: WeightsLike = Weights.LVD1689M,
    check_hash: bool = False,
    **options: Any,
) -> nn.Module:
    """A backbone of the table, with released weights, weights of your own, or random ones.

    Args:
        name: a key of `registry.BACKBONES`, such as "dinov3_vits16".
        pretrained: False: random weights; `weights` then only decides on the architecture.
        weights: a member of `Weights` or its name (fetched from Meta, whose server wants a signed address); or a
            path, a `file://` or `http(s)://` address, or a Hugging Face name (`facebook/dinov3-…`, looked up in the
            local cache); in any layout that `checkpointer.weights` reads.
        check_hash: verify the SHA-256 digits in the file's name, also of cached and local files.
        options: `hash` and `version` replace these parts of Meta's address; `device` is where the model is made; all
            others go to the constructor, in place of what the table says.

    Returns:
        The backbone, in evaluation mode if pretrained and in training mode if not, all parameters requiring
        gradients. Its attribute `normalization` holds mean and standard deviation of the images it was trained on,
        and `make_transform(resize_size=256)` gives the transform. Which data a file without a telling name was
        trained on is taken from what only satellite ViT-L files hold; a 7B file is taken for `LVD1689M`.

    Raises:
        TypeError: an option that the constructor doesn't have.
        ValueError: weights that don't exist for this model, or do not fit it.
        FileNotFoundError, DownloadError: no weights there; the message says where they can be had.
    """
    entry = BACKBONES[name]
    address: dict[str, Any] = {key: options.pop(key) for key in ("hash", "version") if key in options}
    _check_options(entry, options)
    source, kind = _resolve(entry, weights, address)
    settings = dict(entry.options) | options
    if entry.untied_local_norm:
        untied = kind in entry.untied_local_norm
        if kind is None:
            untied = _has_local_norm(entry, source if pretrained else None, check_hash)
        settings.setdefault("untie_global_and_local_cls_norm", untied)
    if kind is None:
        kind = _kind_of_file(entry, source, settings)

    if pretrained:
        model = _load(entry, settings, source, check_hash)
    else:
        model = entry.build(**settings)
        model.init_weights()  # type: ignore[operator]
    normalization = NORMALIZATIONS[kind]
    model.normalization = normalization  # type: ignore[assignment]
    model.make_transform = partial(make_transform, normalization=normalization)  # type: ignore[assignment]
    return model


def _load(
    entry: BackboneEntry, settings: dict[str, Any], source: str | os.PathLike[str], check_hash: bool
) -> nn.Module:
    """The backbone in evaluation mode."""
    with NoInit():
        model = entry.build(**settings)
    state = read_weights(source, like=model, check_hash=check_hash)
    try:
        load_weights(model, state)
    except ValueError as error:
        raise ValueError(f"{entry.name}, weights={os.fspath(source)}: {error}") from error
    return model.eval()


class NoInit(TorchFunctionMode):
    """Modules made in this context are not initialised (`torch.nn.init` does nothing): a file will overwrite them.

    Ten times faster than initialising, and, unlike the meta device, without the import of torch's compiler.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave the tensor that an initialiser was called with as it is; run everything else."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _check_options(entry: BackboneEntry, options: dict[str, Any]) -> None:
    constructor = DinoVisionTransformer if entry.name.startswith("dinov3_vit") else ConvNeXt
    known = ["hash", "version", "device"]
    for parameter in inspect.signature(constructor).parameters.values():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            known.append(parameter.name)
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known ones: {', '.join(sorted(set(known)))}"
            raise TypeError(f"{entry.name}() has no option {option!r}; {hint}")


def _resolve(
    entry: BackboneEntry, weights: WeightsLike, address: dict[str, Any]
) -> tuple[str | os.PathLike[str], Weights | None]:
    """Where the weights are, and which of the released ones they are if their name says so."""
    available = ", ".join(weights.name for weights in entry.hashes)
    member = _member(weights)
    if member is not None:
        if member not in entry.hashes:
            raise ValueError(f"{entry.name} has no weights {member.name}; released are: {available}")
        return entry.url(member, **({"hash": entry.hashes[member]} | address)), member
    if address:
        logger.warning("%s: %s ignored, part of Meta's addresses only", entry.name, " and ".join(address))
    if not isinstance(weights, str | os.PathLike):
        raise TypeError(f"got {weights!r} for weights, expected one of {available}, a path, an address or a name")
    text = os.fspath(weights)
    for other in BACKBONES.values():
        if text in other.hugging_face_names():
            if other is not entry:
                raise ValueError(f"{text} holds the weights of {other.name}, not of {entry.name}")
            return text, other.hugging_face_names()[text]
    if re.fullmatch(r"\w+", text) and not os.path.exists(text):
        raise ValueError(f"unknown weights {text!r}: expected one of {available}, a path, an address or a name")
    return weights, None


def _member(weights: Any) -> Weights | None:
    """`weights` as a member of `Weights` if it is one, or the name of one."""
    if isinstance(weights, str):
        return Weights.__members__.get(weights.upper())
    return weights if isinstance(weights, Weights) else None


def _has_local_norm(entry: BackboneEntry, source: str | os.PathLike[str] | None, check_hash: bool) -> bool:
    """Whether a model for a user's own file has a norm for local crops: as all of its releases, else as the file."""
    if set(entry.untied_local_norm) == set(entry.hashes):
        return True
    return source is not None and "local_cls_norm.weight" in read_weights(source, check_hash=check_hash)


def _kind_of_file(entry: BackboneEntry, source: str | os.PathLike[str], settings: dict[str, Any]) -> Weights:
    """Which data a user's own file was trained on: told by its content where that differs, else by its name."""
    if entry.untied_local_norm == (Weights.SAT493M,) and settings["untie_global_and_local_cls_norm"]:
        return Weights.SAT493M
    name = os.path.basename(urlsplit(os.fspath(source)).path).lower()
    told = (kind for kind, hash in entry.hashes.items() if kind.value.lower() in name or hash in name)
    return next(told, Weights.LVD1689M)
