"""The one table of dtype names, and which dtype a device should compute in."""

import functools
import logging
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

    A CPU without bfloat16 (float16) instructions runs such matrix products in a naive loop, over a hundred times
    slower than float32; there float32 is used instead, with one warning in the log.
    """
    dtype = as_torch_dtype(dtype)
    if torch.device(device).type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not _cpu_computes(dtype):
        _warn_once(dtype)
        return torch.float32
    return dtype


@functools.cache
def _cpu_computes(dtype: torch.dtype) -> bool:
    query = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    namespace = torch.ops.mkldnn
    return hasattr(namespace, query) and bool(getattr(namespace, query)())


@functools.cache
def _warn_once(dtype: torch.dtype) -> None:
    logger.warning("this CPU has no fast %s: computing in float32", str(dtype).removeprefix("torch."))
