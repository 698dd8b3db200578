"""Networks as graphs that run without this package: `torch.export` programs and ONNX files.

Batch and size of the images stay free; the graph's only input is `images` (`tokens` for texts). A network that has a
method `graph_outputs(images)` says there what its graph gives: tensors by name.
"""

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dinov3.models.backbone import Backbone
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
    `[batch, D]` and `patch_tokens` `[batch, P, D]`; another network what its `graph_outputs` says, else what it
    returns: `output`, or the entries of a dictionary under their names.

    Args:
        module: on the CPU or an accelerator; a copy of it is recorded, on the CPU and in evaluation mode.
        destination: the file.
        format: `onnx`, or `pt2` for `torch.export.load`.
        image_size: (height, width) that the network is recorded with; others work too, unless the network has a true
            attribute `graph_fixes_size`, as detectors have.
        in_channels: of the images.
        half: the backbone's weights and products in float16, input and outputs still float32; what stands on the
            backbone stays in float32. A network without a backbone is in float16 altogether.

    Returns:
        The path written.

    Raises:
        ValueError: an unknown format, or outputs that are no tensors.
        ImportError: onnx or onnxscript isn't installed.
    """
    # More than one image: a dimension of size one would be recorded as fixed.
    example = torch.zeros(2, in_channels, *image_size)
    free = (0,) if getattr(module, "graph_fixes_size", False) else (0, 2, 3)
    return _export(_ImageGraph(module, half), "images", example, free, destination, format)


def export_text_graph(
    module: nn.Module,
    destination: str | os.PathLike[str],
    format: str = "onnx",
    *,
    context_length: int = 77,
    half: bool = False,
) -> Path:
    """Write a text tower as a graph: from `tokens`, ids int64 `[batch, context_length]`, to what it returns.

    Arguments and errors as for `export_graph`.
    """
    example = torch.zeros(2, context_length, dtype=torch.int64)
    return _export(_TextGraph(module, half), "tokens", example, (0,), destination, format)


class _Graph(nn.Module):
    """A network with named outputs, all float32 or whole numbers."""

    def __init__(self, module: nn.Module, half: bool) -> None:
        super().__init__()
        self.network = copy.deepcopy(module).cpu().eval().requires_grad_(False)
        self.input_dtype = torch.float32
        if half and not self._halve_backbones():
            self.network, self.input_dtype = self.network.half(), torch.float16

    def _halve_backbones(self) -> bool:
        """Put the backbones that the network stands on into float16; whether there are any."""
        found: dict[str, nn.Module] = {}
        for name, part in self.named_modules():
            if isinstance(part, Backbone) and not name.startswith(tuple(f"{outer}." for outer in found)):
                found[name] = cast(nn.Module, part)
        for name, part in found.items():
            parent, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(parent), attribute, _HalfBackbone(part))
        return bool(found)

    def named_outputs(self, x: Tensor) -> dict[str, Tensor]:
        found = self._call(x if x.dtype == torch.int64 else x.to(self.input_dtype))
        outputs = dict(found) if isinstance(found, Mapping) else {"output": found}
        wrong = [name for name, value in outputs.items() if not isinstance(value, Tensor)]
        if wrong:
            raise ValueError(f"a graph gives tensors; {type(self.network).__name__} gives others: {wrong}")
        return {name: _in_float32(value) for name, value in outputs.items()}

    def _call(self, x: Tensor) -> Any:
        if hasattr(self.network, "graph_outputs"):
            return self.network.graph_outputs(x)  # type: ignore[operator]
        if isinstance(self.network, Backbone):
            features = self.network.forward_features(x)
            return {"class_token": features["x_norm_clstoken"], "patch_tokens": features["x_norm_patchtokens"]}
        return self.network(x)


class _ImageGraph(_Graph):
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named_outputs(images).values())


class _TextGraph(_Graph):
    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named_outputs(tokens).values())


class _HalfBackbone(nn.Module):
    """A backbone in float16 that takes and gives float32."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone.half()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("backbone"), name)

    def forward(self, x: Tensor) -> Any:
        return _in_float32(self.backbone(x.half()))

    def forward_features(self, x: Tensor) -> Any:
        return _in_float32(self.backbone.forward_features(x.half()))  # type: ignore[operator]

    def get_intermediate_layers(self, x: Tensor, *args: Any, **options: Any) -> Any:
        return _in_float32(self.backbone.get_intermediate_layers(x.half(), *args, **options))  # type: ignore[operator]


def _in_float32(value: Any) -> Any:
    """Tensors of float16 in float32, also in tuples, lists and dictionaries; everything else as it is."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _in_float32(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_in_float32(entry) for entry in value)
    return value


def _export(
    graph: _Graph,
    name: str,
    example: Tensor,
    free: tuple[int, ...],
    destination: str | os.PathLike[str],
    format: str,
) -> Path:
    if format not in GRAPH_FORMATS:
        raise ValueError(f"unknown format {format!r}; expected one of {', '.join(GRAPH_FORMATS)}")
    shapes = ({axis: torch.export.Dim.DYNAMIC for axis in free},)
    path = Path(destination).expanduser()
    with torch.no_grad(), atomically(path) as file:
        names = list(graph.named_outputs(example))
        _WRITERS[format](graph.eval(), example, shapes, name, names, file)
    return path


def _write_onnx(graph: nn.Module, example: Tensor, shapes: Any, name: str, outputs: list[str], file: Path) -> None:
    for library in ("onnx", "onnxscript"):
        try:
            __import__(library)
        except ImportError as error:
            raise ImportError(f"writing ONNX needs {library}: pip install 'dinov3[export]'") from error
    program = torch.onnx.export(
        graph,
        (example,),
        input_names=[name],
        output_names=outputs,
        dynamic_shapes=shapes,
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # with dynamo=True it is a program
    program.save(str(file))


def _write_program(graph: nn.Module, example: Tensor, shapes: Any, name: str, outputs: list[str], file: Path) -> None:
    torch.export.save(torch.export.export(graph, (example,), dynamic_shapes=shapes, strict=False), file)


_WRITERS: dict[str, Callable[..., None]] = {"onnx": _write_onnx, "pt2": _write_program}
