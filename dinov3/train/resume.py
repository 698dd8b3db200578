"""Whether a checkpoint is one of the training that is about to continue from it."""

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dinov3.checkpointer.files import dcp_shapes
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
    saved = {k.removeprefix(prefix): shape for k, shape in dcp_shapes(checkpoint).items() if k.startswith(prefix)}
    own = {unwrapped_name(name): tuple(value.shape) for name, value in student.state_dict().items()}
    other = {f"{k} {list(saved[k])} instead of {list(own[k])}" for k in saved.keys() & own if saved[k] != own[k]}
    found = {
        "missing from it": own.keys() - saved.keys(),
        "too many": saved.keys() - own.keys(),
        "of another shape": other,
    }
    problems = [f"{_some(names)} are {what}" for what, names in found.items() if names]
    if problems:
        raise ValueError(
            f"the checkpoint {checkpoint} is one of another model: {'; '.join(problems)}. Change `student`, `dino` and "
            "`ibot` back, or start anew in another --output-dir"
        )


def _some(names: Collection[str], limit: int = 3) -> str:
    return f"{len(names)} tensors ({', '.join(sorted(names)[:limit])}{', …' if len(names) > limit else ''})"
