"""Damage to bytes, texts and JSON, drawn from a random source: what disks, networks and strangers do to files."""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_BYTES = (0x00, 0xFF, 0x7F, 0x80, 0x01, 0x22, 0x2F, 0x5C, 0x7B, 0x7D)
_INTEGERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_INTEGERS += (2**63 - 1, 2**63, 2**64 - 1)
_CHARACTERS = "aZ0 _-.:=/\\\"'`,;!?#%&*+~^$@|<>()[]{}\t\n\r\0é€ß漢🙂\u200d\u202e\ufeff\u0300\udc80"


@dataclass(frozen=True)
class Damaged:
    """Bytes after an accident.

    Attributes:
        data: the bytes.
        kind: of accident: "none", "overwritten", "cut", "moved" (bytes went away, came in, or changed places), "other"
            (something else altogether).
        n_changed: how many bytes hold other values than before, for "overwritten"; else 0.
    """

    data: bytes
    kind: str
    n_changed: int = 0


def damage(rng: random.Random, data: bytes) -> Damaged:
    """One kind of damage, sometimes none."""
    return rng.choices([how for how, _ in _KINDS], [weight for _, weight in _KINDS])[0](rng, data)


def _none(rng: random.Random, data: bytes) -> Damaged:
    return Damaged(data, "none")


def _flip_bits(rng: random.Random, data: bytes) -> Damaged:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        changed[_place(rng, len(data))] ^= 1 << rng.randrange(8)
    return _overwritten(data, changed)


def _set_bytes(rng: random.Random, data: bytes) -> Damaged:
    changed = bytearray(data)
    start = _place(rng, len(data))
    for i in range(start, min(start + rng.choice((1, 1, 2, 4, 8, 64)), len(data))):
        changed[i] = rng.choice((*_BYTES, rng.randrange(256)))
    return _overwritten(data, changed)


def _set_integer(rng: random.Random, data: bytes) -> Damaged:
    width = rng.choice((1, 2, 4, 8))
    value = (rng.choice(_INTEGERS) + rng.choice((0, 0, -1, 1))) % 256**width
    start = _place(rng, max(len(data) - width, 1))
    changed = bytearray(data)
    changed[start : start + width] = value.to_bytes(width, rng.choice(("little", "big")))[: len(data) - start]
    return _overwritten(data, changed)


def _zero_block(rng: random.Random, data: bytes) -> Damaged:
    """A block that never reached the disk."""
    size = rng.choice((16, 64, 512, 4096))
    start = rng.randrange(len(data)) // size * size
    changed = bytearray(data)
    changed[start : start + size] = bytes(len(changed[start : start + size]))
    return _overwritten(data, changed)


def _cut(rng: random.Random, data: bytes) -> Damaged:
    return Damaged(data[: rng.choice((rng.randrange(len(data)), max(len(data) - rng.randint(1, 64), 0)))], "cut")


def _move(rng: random.Random, data: bytes) -> Damaged:
    start, length = _place(rng, len(data)), rng.choice((1, 1, 4, 16, 512))
    span, rest = data[start : start + length], data[start + length :]
    changed = rng.choice(
        (
            data[:start] + rest,
            data[:start] + span + span + rest,
            data[:start] + rng.randbytes(length) + span + rest,
            data[start:] + data[:start],
            data + rng.randbytes(length),
        )
    )
    return Damaged(changed, "moved" if changed != data else "none")


def _rubbish(rng: random.Random, data: bytes) -> Damaged:
    head = data[: rng.choice((0, 0, 1, 4, 8, 64))]
    return Damaged(head + rng.randbytes(rng.choice((0, 1, 7, 8, 64, 1024))), "other")


def _overwritten(before: bytes, after: bytearray) -> Damaged:
    n_changed = sum(a != b for a, b in zip(before, after, strict=True))
    return Damaged(bytes(after), "overwritten" if n_changed else "none", n_changed)


def _place(rng: random.Random, size: int) -> int:
    """A position, more often near the beginning or the end, where headers and directories stand."""
    where = rng.random()
    if where < 0.25:
        return rng.randrange(min(size, 128))
    if where < 0.5:
        return max(size - 1 - rng.randrange(min(size, 512)), 0)
    return rng.randrange(size)


_KINDS: list[tuple[Callable[[random.Random, bytes], Damaged], int]] = [
    (_none, 2),
    (_flip_bits, 40),
    (_set_bytes, 12),
    (_set_integer, 12),
    (_zero_block, 6),
    (_cut, 16),
    (_move, 10),
    (_rubbish, 2),
]


def odd_text(rng: random.Random, at_most: int = 12) -> str:
    """Characters that grammars, paths and encodings trip over."""
    return "".join(rng.choice(_CHARACTERS) for _ in range(rng.randint(0, at_most)))


def damage_text(rng: random.Random, text: str) -> str:
    """A text with characters that went away, came in, or changed."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(text) + 1)
        end = start + rng.choice((0, 1, 1, 8))
        text = text[:start] + rng.choice(("", odd_text(rng, 3), text[start:end] * 2)) + text[end:]
    return text


def odd_value(rng: random.Random) -> Any:
    """A JSON value that is seldom expected."""
    choices: tuple[Any, ...] = (
        *(
            None,
            True,
            False,
            0,
            1,
            -1,
            2**31,
            2**63,
            -(2**63) - 1,
            10**30,
            0.5,
            -0.0,
            1e308,
            float("nan"),
            float("inf"),
        ),
        *("", "0", "1", "a", "../../x", "/etc/passwd", "\0", [], {}, [[]], {"a": 1}, ["a"], [1, 2]),
    )
    return copy.deepcopy(rng.choice(choices)) if rng.random() < 0.9 else odd_text(rng)


def damage_json(rng: random.Random, tree: Any) -> Any:
    """A copy of a tree of lists and dictionaries with a few nodes changed, taken out, repeated or nested."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        nodes = list(_nodes(tree))
        if not nodes:
            break
        holder, key = rng.choice(nodes)
        how = rng.random()
        if how < 0.6:
            holder[key] = odd_value(rng)
        elif how < 0.8:
            del holder[key]
        elif how < 0.9 and isinstance(holder, list):
            holder.insert(rng.randint(0, len(holder)), copy.deepcopy(holder[key]))
        else:
            holder[key] = rng.choice(([holder[key]], {"a": holder[key]}, copy.deepcopy(rng.choice(nodes)[0])))
    return tree


def _nodes(tree: Any) -> Any:
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _nodes(tree[key])


def damage_json_text(rng: random.Random, tree: Any) -> bytes:
    """The bytes of a JSON file whose tree or whose text is damaged, or which is nested too deep."""
    how = rng.random()
    if how < 0.7:
        return json.dumps(damage_json(rng, tree)).encode()
    if how < 0.98:
        return damage(rng, json.dumps(tree).encode()).data
    return b'{"a":' * 2000 + b"[" * 200_000
