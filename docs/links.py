"""A hook of the documentation site: links to files of the repository become plain code, since the site lacks them."""

import re
from typing import Any

_LINK = re.compile(r"\[`?([^\]`]+)`?\]\((?:\.\./)[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`[train/loop.py](../dinov3/train/loop.py)` becomes `train/loop.py` in code."""
    return _LINK.sub(r"`\1`", markdown)
