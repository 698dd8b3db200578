"""What a number depends on: the processor or accelerator, and the versions of the libraries."""

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

LIBRARIES = ("torch", "torchvision", "timm", "transformers", "scikit-learn", "numpy", "pillow")


def describe_machine(device: torch.device, threads: int) -> str:
    """Model of the processor, cores and threads, memory; before that the accelerator, if it is the device."""
    memory = f", {round(_memory_bytes() / 2**30)} GiB" if _memory_bytes() else ""
    host = f"{_processor()}, {os.cpu_count()} cores, {threads} threads{memory}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; {host}"
    return host


def versions(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Versions of Python and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        named = {key.strip(): value.strip() for key, value in fields.items()}
        numbers = [f"{key} {named[key]}" for key in ("cpu family", "model") if key in named]
        return f"{named.get('model name', platform.machine())} ({', '.join(numbers)})"
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return 0
