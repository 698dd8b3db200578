"""Files of trained task heads: all that is needed to use a head again, except the weights of its backbone.

One format for segmentation, depth and detection. `hub/heads.py` makes a model from such a file. Needs torch alone.
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3.checkpointer.files import read_file
from dinov3.utils.files import atomically

HEAD_FILE = "head.pth"
_FORMAT = "dinov3 task head, version 1"
_PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class HeadFile:
    """A trained head.

    Attributes:
        task: `"segmentation"`, `"depth"`, `"detection"`.
        head: its tensors by name; none of the backbone's.
        config: plain values (numbers, text, lists and dictionaries of them) that the task rebuilds the module from.
        backbone: what it was trained on: name of a hub entry, or the values that `models.build.build_backbone` reads.
        class_names: name by class index, None if there are no classes or no names.
        mean, std: of red, green and blue, for images in [0, 1].
    """

    task: str
    head: dict[str, Tensor]
    config: dict[str, Any]
    backbone: str | dict[str, Any]
    class_names: list[str] | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


def save_head(path: str | os.PathLike[str], head_file: HeadFile) -> Path:
    """Write a head file; readers see the old file or the new one, never a part.

    Args:
        path: the file; folders are made as needed.
        head_file: its tensors are copied to the CPU.

    Returns:
        The path written.

    Raises:
        TypeError: `config` or `backbone` hold other than plain values, or `head` other than tensors.
    """
    for name in ("config", "backbone", "class_names"):
        _check_plain(name, getattr(head_file, name))
    wrong = [key for key, value in head_file.head.items() if not isinstance(value, Tensor)]
    if wrong:
        raise TypeError(f"head holds other than tensors: {', '.join(wrong[:5])}")
    path = Path(path).expanduser()
    content = {field.name: getattr(head_file, field.name) for field in fields(head_file)}
    content["head"] = {key: value.detach().cpu().clone() for key, value in head_file.head.items()}
    with atomically(path) as file:
        torch.save({"format": _FORMAT, **content}, file)
    return path


def is_head_file(path: str | os.PathLike[str]) -> bool:
    """Whether `read_head` can read this file, or this folder."""
    file = Path(path).expanduser()
    if file.is_dir():
        return (file / HEAD_FILE).is_file()
    if not file.is_file():
        return False
    content = read_file(file)
    return isinstance(content, dict) and content.get("format") == _FORMAT


def read_head(path: str | os.PathLike[str]) -> HeadFile:
    """The content of a head file, on the CPU. No code in a file is ever run.

    Args:
        path: the file, or the output folder of a training, which holds it as `head.pth`.

    Raises:
        FileNotFoundError: it isn't there.
        ValueError: it isn't a head file, or is damaged.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file /= HEAD_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: expected a head file, or the output folder of a head's training")
    content = read_file(file)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        held = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{file} is not a head file: it holds {held or 'nothing'}. Trainings here write one as {HEAD_FILE}"
        )
    names = {field.name for field in fields(HeadFile)}
    if missing := names - content.keys():
        raise ValueError(f"{file} is an incomplete head file: it lacks {', '.join(sorted(missing))}")
    return HeadFile(**{name: content[name] for name in names})


def _check_plain(name: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_plain(f"{name}[{i}]", item)
    elif not isinstance(value, _PLAIN):
        raise TypeError(f"{name} of a head file must be plain values, got {type(value).__name__}: {value!r}")
