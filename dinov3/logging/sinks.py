"""Where records of metrics go. A record maps names to numbers, `iteration` first."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

logger = logging.getLogger("dinov3")


class Sink(Protocol):
    """Takes records; is called in the main process of the subgroup only."""

    def write(self, record: Mapping[str, float]) -> None:
        """Store one record."""


class JsonLinesSink:
    """Appends every record to a file, one JSON object per line.

    The file is opened for each record: it may be removed or rewritten in between. A record that can't be stored (a full
    disk) is lost with a warning: hours of training are worth more than a line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, record: Mapping[str, float]) -> None:
        """Append one line."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            logger.warning("the metrics of iteration %s are lost: %s", record.get("iteration"), error)
