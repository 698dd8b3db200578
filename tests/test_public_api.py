"""Public names: every one that a published interface or a golden case uses can be imported from where it is expected.

`public_api.json` is the inventory (module -> names, `Class.member` allowed). Removing a name from the package makes
these tests fail; a new public name is added to the file in the same commit.
"""

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

INVENTORY: dict[str, list[str]] = json.loads((Path(__file__).parent / "public_api.json").read_text())

# Not built yet: prefix of the dotted names -> what brings them. A name that is built but still listed is a failure, so
# that this table can only shrink.
PENDING: dict[str, str] = {}


def _golden_targets() -> set[str]:
    """Dotted names that stand as a string of their own in the golden manifests."""
    texts = (path.read_text() for path in (Path(__file__).parent / "golden").glob("*.json"))
    return {name for text in texts for name in re.findall(r'"(dinov3(?:\.\w+)+)"', text)}


NAMES = sorted({f"{module}.{name}" for module, names in INVENTORY.items() for name in names} | _golden_targets())


def _reason_pending(name: str) -> str | None:
    return next((why for prefix, why in PENDING.items() if name == prefix or name.startswith(prefix + ".")), None)


def _resolve(name: str) -> Any:
    """The object of a dotted name: the longest prefix that is a module, then attributes."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        module = ".".join(parts[:n])
        try:
            found: Any = import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module + ".").startswith(error.name + "."):
                raise  # something that the module needs is missing, not the module
            continue
        for part in parts[n:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def test_the_inventory_names_what_the_golden_cases_use() -> None:
    assert len(_golden_targets()) > 80
    assert "dinov3.layers.block.SelfAttentionBlock" in _golden_targets()


@pytest.mark.parametrize("name", [name for name in NAMES if not _reason_pending(name)])
def test_name_can_be_imported(name: str) -> None:
    _resolve(name)


@pytest.mark.parametrize("prefix", PENDING)
def test_pending_names_are_pending(prefix: str) -> None:
    pending = [name for name in NAMES if name == prefix or name.startswith(prefix + ".")]
    assert pending, f"nothing is listed under {prefix}"
    built = []
    for name in pending:
        try:
            _resolve(name)
        except (ModuleNotFoundError, AttributeError):
            continue
        built.append(name)
    assert not built, f"built, so take them off PENDING: {built}"
