"""Networks as graphs that run without this package: `torch.export` programs and ONNX files.

Batch and size of the images stay free; the graph's only input is `images`.
"""

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.utils.files import atomically

GRAPH_FORMATS = ("onnx", "pt2")


def export_graph(
    module: nn.Module,
    destination: str | os.PathLike[str],
    format: str = "onnx",
    *,
    image_size: tuple[int, int] = (224, 224),
    in_channels: int = 3,
    half: bool = False,
) -> Path:
    """Write a network as a graph.

    The input `images` is float32 `[batch, in_channels, height, width]`, normalised. A backbone gives `class_token`
    `[batch, D]` and `patch_tokens` `[batch, P, D]`; another network what it returns: `output`, or the entries of a
    dictionary under their names.

    Args:
        module: on the CPU or an accelerator; it is used in evaluation mode.
        destination: the file.
        format: `onnx`, or `pt2` for `torch.export.load`.
        image_size: (height, width) that the network is recorded with; others work too if it allows them.
        in_channels: of the images.
        half: weights and products in float16, input and outputs still float32.

    Returns:
        The path written.

    Raises:
        ValueError: an unknown format.
        ImportError: onnx or onnxscript isn't installed.
    """
    if format not in GRAPH_FORMATS:
        raise ValueError(f"unknown format {format!r}; expected one of {', '.join(GRAPH_FORMATS)}")
    network = copy.deepcopy(module).eval().requires_grad_(False)
    if half:
        network = network.half()
    device = next(network.parameters()).device
    # More than one image: a dimension of size one would be recorded as fixed.
    example = torch.zeros(2, in_channels, *image_size, device=device)
    graph = _Graph(network, torch.float16 if half else torch.float32)
    with torch.no_grad():
        names = list(graph.named_outputs(example))
    free = torch.export.Dim.DYNAMIC
    shapes = ({0: free, 2: free, 3: free},)
    path = Path(destination).expanduser()
    with atomically(path) as file:
        _WRITERS[format](graph.eval(), example, shapes, names, file)
    return path


class _Graph(nn.Module):
    """The network with one input and a tuple of named outputs, all float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def named_outputs(self, images: Tensor) -> dict[str, Tensor]:
        images = images.to(self.dtype)
        if hasattr(self.network, "forward_features"):
            features: Mapping[str, Tensor] = self.network.forward_features(images)  # type: ignore[operator]
            outputs = {"class_token": features["x_norm_clstoken"], "patch_tokens": features["x_norm_patchtokens"]}
        else:
            found = self.network(images)
            outputs = dict(found) if isinstance(found, Mapping) else {"output": found}
            wrong = [name for name, value in outputs.items() if not isinstance(value, Tensor)]
            if wrong:
                raise ValueError(f"a graph gives tensors; {type(self.network).__name__} gives others: {wrong}")
        return {name: value.float() for name, value in outputs.items()}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named_outputs(images).values())


def _write_onnx(graph: nn.Module, example: Tensor, shapes: Any, names: list[str], file: Path) -> None:
    for library in ("onnx", "onnxscript"):
        try:
            __import__(library)
        except ImportError as error:
            raise ImportError(f"writing ONNX needs {library}: pip install 'dinov3[export]'") from error
    program = torch.onnx.export(
        graph,
        (example,),
        input_names=["images"],
        output_names=names,
        dynamic_shapes=shapes,
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # with dynamo=True it is a program
    program.save(str(file))


def _write_program(graph: nn.Module, example: Tensor, shapes: Any, names: list[str], file: Path) -> None:
    torch.export.save(torch.export.export(graph, (example,), dynamic_shapes=shapes), file)


_WRITERS: dict[str, Callable[..., None]] = {"onnx": _write_onnx, "pt2": _write_program}
