"""Running exported graphs."""

from pathlib import Path

import torch
from torch import Tensor


def run_onnx(path: Path, inputs: Tensor, name: str = "images") -> dict[str, Tensor]:
    """What ONNX Runtime gives, by the names of the outputs; the graph's only input must be called `name`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == [name]
    names = [entry.name for entry in session.get_outputs()]
    found = session.run(None, {name: inputs.numpy()})
    return {output: torch.from_numpy(value) for output, value in zip(names, found, strict=True)}
