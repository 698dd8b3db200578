"""Class names and prompt templates, from files, data sets, or an installed open_clip.

None are written down here: those of CLIP (MIT licence) come with the package `open_clip_torch`.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dinov3.eval.text.zero_shot import fill_templates
from dinov3.utils.files import read_json, read_text

OPEN_CLIP = "open_clip"
DATASET = "dataset"

_NO_OPEN_CLIP = (
    "needs the class names and templates that open_clip brings: pip install open_clip_torch, or give a file of your own"
)


def read_lines(path: str | Path) -> list[str]:
    """The strings of a file: a JSON list, or one a line (empty lines and those that begin with # are left out).

    Of a table with tabs and a header with `Name` (such as `objectInfo150.txt` of ADE20K) that column is read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no string, or other JSON.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file} of class names or templates")
    if file.suffix == ".json":
        found = read_json(file)
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise ValueError(f"{file} must hold a JSON list of strings")
    else:
        found = [line.strip() for line in read_text(file).splitlines() if line.strip() and not line.startswith("#")]
        header = [column.strip() for column in found[0].split("\t")] if found else []
        if "Name" in header:
            rows = [line.split("\t") for line in found[1:]]
            if short := [row for row in rows if len(row) <= header.index("Name")]:
                raise ValueError(f"{file} has a row without Name: {short[0]}")
            found = [row[header.index("Name")].strip() for row in rows]
    if not found:
        raise ValueError(f"{file} holds no class name or template")
    return found


def find_class_names(source: str, dataset: Any = None, *, first_synonym: bool = False) -> list[str]:
    """Class names by class index.

    Args:
        source: `"dataset"`: those of the data set (its `class_names`); `"open_clip"`: of ImageNet-1k, as CLIP words
            them; anything else: a file, see `read_lines`.
        dataset: needed for the first.
        first_synonym: of names that list several ("sofa, couch"; "sofa;couch") take the first.

    Raises:
        ValueError: the data set has no names. ImportError: open_clip isn't installed. FileNotFoundError: no such file.
    """
    if source == OPEN_CLIP:
        names = [str(name) for name in _open_clip("IMAGENET_CLASSNAMES")]
    elif source == DATASET:
        names = list(getattr(dataset, "class_names", None) or ())
    else:
        names = read_lines(source)
    if not names:
        raise ValueError(
            f"{type(dataset).__name__} has no class names: give a file with one a line (class_names=<FILE>), in the "
            "order of the class indices"
        )
    return [re.split("[,;]", name)[0].strip() for name in names] if first_synonym else names


def find_templates(source: str) -> list[str]:
    """Prompt templates with `{}` for the name of the class.

    Args:
        source: `"open_clip"`: the 80 that CLIP used for ImageNet; a text with `{}`: that one; anything else: a file.

    Raises:
        ValueError: one without `{}`. ImportError: open_clip isn't installed. FileNotFoundError: no such file.
    """
    if source == OPEN_CLIP:
        templates: Sequence[Callable[[str], str]] = _open_clip("OPENAI_IMAGENET_TEMPLATES")
        return [template("{}") for template in templates]
    templates_found = [source] if "{}" in source else read_lines(source)
    fill_templates("", templates_found)  # checks them
    return templates_found


def _open_clip(name: str) -> Any:
    try:
        return getattr(importlib.import_module(OPEN_CLIP), name)
    except ImportError as error:
        raise ImportError(f"{OPEN_CLIP!r} {_NO_OPEN_CLIP}") from error
