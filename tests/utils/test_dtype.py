"""Dtype names and the dtype to compute in."""

import logging

import numpy as np
import pytest
import torch

from dinov3.utils import as_torch_dtype
from dinov3.utils import dtype as dtype_module
from dinov3.utils.dtype import resolve_compute_dtype


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (torch.float16, torch.float16),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("fp32", torch.float32),
        (np.dtype("uint8"), torch.uint8),
        (np.int64, torch.int64),
        (np.dtype("bool"), torch.bool),
        (np.bool_, torch.bool),
        ("complex64", torch.complex64),
    ],
)
def test_as_torch_dtype(spec: object, expected: torch.dtype) -> None:
    assert as_torch_dtype(spec) is expected


def test_as_torch_dtype_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="float23"):
        as_torch_dtype("float23")
    with pytest.raises(TypeError, match="expected a torch dtype"):
        as_torch_dtype(32)


def test_half_precision_becomes_float32_on_a_cpu_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    dtype_module._warn_once.cache_clear()
    logging.getLogger("dinov3").propagate = True
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        assert resolve_compute_dtype("bf16", "cpu") is torch.float32
        assert resolve_compute_dtype(torch.bfloat16, torch.device("cpu")) is torch.float32
    assert [record.message for record in caplog.records] == ["computing in float32: bfloat16 is for accelerators"]


def test_other_dtypes_and_devices_are_kept() -> None:
    assert resolve_compute_dtype("fp32", "cpu") is torch.float32
    assert resolve_compute_dtype(torch.float64, "cpu") is torch.float64
    assert resolve_compute_dtype("bf16", "cuda") is torch.bfloat16
    assert resolve_compute_dtype("fp16", "mps") is torch.float16
