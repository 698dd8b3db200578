"""The one table of dtype names, and which dtype a device should compute in."""

import functools
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

logger = logging.getLogger("dinov3")

dtype_dict: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_NAMES: dict[str, torch.dtype] = dtype_dict | {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    )
}


def as_torch_dtype(spec: Any) -> torch.dtype:
    """The torch dtype that `spec` means.

    Args:
        spec: a torch dtype, a NumPy dtype or scalar type, or a name such as `"float32"`, `"bfloat16"` or `"bf16"`.

    Raises:
        TypeError: `spec` is none of these.
        ValueError: an unknown name.
    """
    if isinstance(spec, torch.dtype):
        return spec
    # A NumPy dtype has `name`, a NumPy scalar type only `__name__`; read so, NumPy need not be there.
    name = spec if isinstance(spec, str) else getattr(spec, "name", None) or getattr(spec, "__name__", None)
    if not isinstance(name, str):
        raise TypeError(f"got {spec!r} for a dtype, expected a torch dtype, a NumPy dtype or a name")
    try:
        return _NAMES[name.removeprefix("torch.").removesuffix("_")]  # NumPy 1 says "bool_"
    except KeyError:
        raise ValueError(f"unknown dtype {name!r}; known names: {', '.join(_NAMES)}") from None


def resolve_compute_dtype(dtype: torch.dtype | str, device: torch.device | str) -> torch.dtype:
    """The dtype to compute in on `device` when `dtype` is asked for.

    A CPU computes in float32 instead of bfloat16 or float16, with one warning in the log: few have instructions for
    these (others are over a hundred times slower with them), and results should not depend on which CPU it is.
    """
    dtype = as_torch_dtype(dtype)
    if torch.device(device).type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        _warn_once(dtype)
        return torch.float32
    return dtype


def autocast_to(device: torch.device | str, dtype: torch.dtype = torch.float32) -> AbstractContextManager[Any]:
    """Compute in `dtype` inside: under autocast, or for float32 without it, whatever there is outside.

    While a graph is recorded nothing is changed: all of it is float32, and autocast would have no place in it.
    """
    if torch.compiler.is_exporting():
        return nullcontext()
    device_type = torch.device(device).type
    lowered = resolve_compute_dtype(dtype, device_type) in (torch.bfloat16, torch.float16)
    return torch.autocast(device_type, dtype=dtype if lowered else None, enabled=lowered)


@functools.cache
def _warn_once(dtype: torch.dtype) -> None:
    logger.warning("computing in float32: %s is for accelerators", str(dtype).removeprefix("torch."))
