"""The random generators of a process as a part of its checkpoint."""

import importlib.util
import json
import logging
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov3 import distributed
from dinov3.utils.device import default_device

logger = logging.getLogger("dinov3")


class RandomState:
    """Generators of Python, NumPy, torch (CPU and current accelerator), one set per rank; a `Stateful` of DCP.

    A checkpoint of fewer ranks, or of another kind of device, has no state for some generators: those stay as they are.
    """

    may_be_missing = True
    """`load_checkpoint` doesn't ask for these keys even when it is strict."""

    def state_dict(self) -> dict[str, dict[str, Tensor | str]]:
        """The states, under the rank of this process."""
        state: dict[str, Tensor | str] = {"torch": torch.get_rng_state(), "python": json.dumps(random.getstate())}
        if importlib.util.find_spec("numpy") is not None:
            import numpy as np

            state["numpy"] = json.dumps(np.random.get_state(legacy=False), default=lambda array: array.tolist())
        device = default_device()
        if device.type != "cpu":
            state[device.type] = torch.get_device_module(device).get_rng_state()
        return {f"rank_{distributed.get_rank()}": state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put the generators into the saved states."""
        state = state_dict.get(f"rank_{distributed.get_rank()}")
        if state is None:
            logger.warning("the checkpoint has no random states of rank %d", distributed.get_rank())
            return
        torch.set_rng_state(state["torch"])
        version, internal, gauss_next = json.loads(state["python"])
        random.setstate((version, tuple(internal), gauss_next))
        if "numpy" in state and importlib.util.find_spec("numpy") is not None:
            import numpy as np

            numpy_state = json.loads(state["numpy"])
            numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
            np.random.set_state(numpy_state)
        device = default_device()
        if device.type in state:
            torch.get_device_module(device).set_rng_state(state[device.type])
