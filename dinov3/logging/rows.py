"""Files of JSON lines with an `iteration` each, in which every iteration stands once however often a run was killed."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov3 import distributed
from dinov3.utils.files import atomically


def drop_rows_from(file: Path, iteration: int) -> None:
    """Remove the rows of iterations that are about to be done again, so that each stands in the file once.

    A last line that was cut off when the run was killed is dropped too. Main process of the subgroup only.
    """
    if not distributed.is_subgroup_main_process() or not file.exists():
        return
    kept = [line for line in file.read_text(encoding="utf-8").splitlines() if _iteration_of(line) < iteration]
    with atomically(file) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def add_row(file: Path, iteration: int, values: Mapping[str, Any]) -> None:
    """Add the row of an iteration, in the place of one that is there already. Main process of the subgroup only."""
    if not distributed.is_subgroup_main_process():
        return
    drop_rows_from(file, iteration)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as rows:
        rows.write(json.dumps({"iteration": iteration, **values}) + "\n")


def _iteration_of(line: str) -> float:
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return math.inf
