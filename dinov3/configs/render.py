"""`ssl_default_config.yaml` from the schema: `python -m dinov3.configs.render` writes it beside this file."""

import ast
import dataclasses
import functools
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dinov3.configs import schema
from dinov3.configs.legacy import LEGACY_DEFAULTS, add_legacy_defaults

DEFAULTS_FILE = Path(__file__).with_name("ssl_default_config.yaml")
_HEADER = """\
# The defaults of a training. Generated from dinov3/configs/schema.py: python -m dinov3.configs.render
# "v1": counts only without a section `schedules`. "no effect": accepted for old files, nothing reads it.
"""


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the docstring below it, for a dataclass of the schema and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (definition,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def render_defaults() -> str:
    """The text of `ssl_default_config.yaml`."""
    values = add_legacy_defaults(schema.default_values())
    return _HEADER + "\n".join(_lines(values, schema.SSLConfig)) + "\n"


def _lines(values: Mapping[str, Any], cls: type | None, prefix: str = "") -> Iterator[str]:
    docs = {} if cls is None else field_docs(cls)
    sections = {} if cls is None else {f.name: f.metadata.get("section") for f in dataclasses.fields(cls)}
    indent = "  " * prefix.count(".")
    for name, value in values.items():
        key = f"{prefix}{name}"
        comment = "no effect" if key in LEGACY_DEFAULTS else docs.get(name, "")
        if isinstance(value, Mapping):
            yield f"{indent}{name}:" + (f"  # {comment}" if comment else "")
            yield from _lines(value, sections.get(name), f"{key}.")
        else:
            yield f"{indent}{name}: {_scalar(value)}" + (f"  # {comment}" if comment else "")


def _scalar(value: Any) -> str:
    # JSON is YAML, except that YAML 1.1 wants a dot in floats such as 1e-05.
    text = json.dumps(value)
    return text.replace("e-", ".0e-") if isinstance(value, float) and "e-" in text and "." not in text else text


if __name__ == "__main__":
    DEFAULTS_FILE.write_text(render_defaults())
