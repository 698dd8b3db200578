"""What the entry points of released heads share: where a head's file is, and a model built around it."""

import os
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, TypeVar

from torch import Tensor, nn

from dinov3.hub.loading import NoInit
from dinov3.hub.registry import BASE_URL

_Model = TypeVar("_Model", bound=nn.Module)


def find_head(
    kinds: type[Enum],
    released: Mapping[tuple[str, Any], str],
    backbone_name: str,
    weights: Any,
    hash: str | None,
    *,
    what: str,
    suffix: str,
) -> str | os.PathLike[str]:
    """Where a head's weights are.

    Args:
        kinds: what heads were trained on.
        released: first digits of the SHA-256 of the released head of (backbone, kind).
        backbone_name: the backbone that the head is for.
        weights: a member of `kinds` or its name, a path, or an address.
        hash: replaces the digits in Meta's address.
        what: the kind of head, for the message.
        suffix: of the names of released files.

    Raises:
        ValueError: no head was released for this backbone.
        TypeError: weights that are no name, path or address.
    """
    member = kinds.__members__.get(weights.upper()) if isinstance(weights, str) else weights
    if isinstance(member, kinds):
        known = released.get((backbone_name, member))
        if known is None:
            raise ValueError(f"there is no released {what} on {backbone_name}: give a path or an address")
        return f"{BASE_URL}/{backbone_name}/{backbone_name}_{member.value.lower()}_{suffix}-{hash or known}.pth"
    if isinstance(weights, str | os.PathLike):
        return weights
    names = ", ".join(kinds.__members__)
    raise TypeError(f"got {weights!r} for weights, expected one of {names}, a path or an address")


def build_with_head(
    build: Callable[[], _Model],
    load: Callable[[_Model, dict[str, Tensor]], object],
    source: str | os.PathLike[str] | None,
    *,
    what: str,
    check_hash: bool,
) -> _Model:
    """A model with the head of a file, or with random weights.

    Args:
        build: makes the model around its backbone.
        load: gives the head its tensors, strictly.
        source: see `find_head`; None: random weights.
        what: the kind of head and its backbone, for the message.
        check_hash: verify the SHA-256 digits in the file's name.

    Raises:
        ValueError: tensors that don't fit; besides what `read_state_dict` raises.
    """
    if source is None:
        return build()
    from dinov3.checkpointer.weights import read_state_dict

    with NoInit():
        model = build()
    try:
        load(model, read_state_dict(source, check_hash=check_hash))
    except ValueError as error:
        raise ValueError(f"{what}, weights={os.fspath(source)}: {error}") from error
    return model
