"""Whether a checkpoint is one of the training that is about to continue from it."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dinov3.checkpointer.files import dcp_tensor_names
from dinov3.utils.modules import unwrapped_name

logger = logging.getLogger("dinov3")

# Settings that change how a run is executed or watched, but not what it computes.
_WITHOUT_EFFECT_ON_RESULTS = (
    "train.output_dir",
    "train.num_workers",
    "train.checkpointing",
    "train.checkpointing_full",
    "train.compile",
    "train.cudagraphs",
    "train.sharded_eval_checkpoint",
    "evaluation.",
    "checkpointing.",
)


class RecordedConfig:
    """The configuration of a run as a part of its checkpoint; a `Stateful` of DCP.

    Args:
        flat: dotted keys and plain values of the current run.
    """

    may_be_missing = True
    """Checkpoints of the original code have none."""

    def __init__(self, flat: Mapping[str, Any]) -> None:
        self.flat = dict(flat)

    def state_dict(self) -> dict[str, str]:
        """The configuration as one string."""
        return {"json": json.dumps(self.flat)}

    def load_state_dict(self, state_dict: Mapping[str, str]) -> None:
        """Log which settings have changed since the checkpoint was written."""
        before = json.loads(state_dict["json"])
        changed = [
            f"{key}: {before.get(key)} -> {self.flat.get(key)}"
            for key in sorted(before.keys() | self.flat.keys())
            if before.get(key) != self.flat.get(key) and not key.startswith(_WITHOUT_EFFECT_ON_RESULTS)
        ]
        if changed:
            logger.warning("settings have changed since the checkpoint was written: %s", "; ".join(changed))


def check_same_student(checkpoint: Path, student: nn.Module) -> None:
    """Refuse a checkpoint whose student has other parameters than this one.

    Parts that a stage adds, such as a Gram teacher, may be missing: they keep their first weights.

    Raises:
        ValueError: which parameters differ, and what to do.
    """
    prefix = "model.student."
    saved = {name.removeprefix(prefix) for name in dcp_tensor_names(checkpoint) if name.startswith(prefix)}
    own = {unwrapped_name(name) for name in student.state_dict()}
    if saved == own:
        return
    raise ValueError(
        f"the checkpoint {checkpoint} is one of another model: {_some(own - saved)} are missing from it, and it has "
        f"{_some(saved - own)} more. Change `student`, `dino` and `ibot` back, or start anew in another --output-dir"
    )


def _some(names: set[str], limit: int = 3) -> str:
    listed = ", ".join(sorted(names)[:limit])
    return f"{len(names)} tensors" + (f" ({listed}{', …' if len(names) > limit else ''})" if names else "")
