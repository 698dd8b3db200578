"""How much memory this process uses."""

import sys
from pathlib import Path

import torch

from dinov3.utils.device import default_device

_MIB = 1024.0 * 1024.0


def memory_mib() -> tuple[float, float] | None:
    """Memory now and at its peak, in MiB: of tensors on the accelerator, else of the process; None if unknown."""
    device = default_device()
    if device.type != "cpu":
        module = torch.get_device_module(device)
        if hasattr(module, "memory_allocated") and hasattr(module, "max_memory_allocated"):
            return module.memory_allocated() / _MIB, module.max_memory_allocated() / _MIB
    return _process_memory_mib()


def _process_memory_mib() -> tuple[float, float] | None:
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (_MIB if sys.platform == "darwin" else 1024.0)
    status = Path("/proc/self/statm")
    now = int(status.read_text().split()[1]) * resource.getpagesize() / _MIB if status.exists() else peak
    return now, max(now, peak)
