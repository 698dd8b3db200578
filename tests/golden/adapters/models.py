"""Golden cases of layers, backbones, hub models and file layouts.

A case names a class or function by its dotted path and lists calls to it; "Case format" in the manifest describes the
JSON values. Outputs of a call are named `<call>/<path in the nested result>`, and `<call>` alone stands for the shapes
and dtypes of all of them.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

from tests.golden import fill
from tests.golden.adapters import models_layouts
from tests.golden.cases import Case, Expected

MAX_WHOLE = 2048  # larger outputs are stored as statistics
N_FIRST = 64

Described = dict[str, list[Any]]


def cases(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> list[Case]:
    """All cases of the manifest, and one for each converted state dict."""
    by_name = {entry["name"]: entry for entry in manifest["cases"]}
    layouts = {name: layout for name, layout in manifest.get("layouts", {}).items() if name != "about"}
    found = [_case(entry, tensors) for entry in by_name.values()]
    return found + [
        models_layouts.case(name, layout, partial(_build, by_name[name])) for name, layout in layouts.items()
    ]


def _case(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Case:
    name = entry["name"]
    expected: dict[str, Expected] = {}
    stored_keys = set()
    if "state_dict" in entry:
        expected["state_dict"] = Expected(entry["state_dict"])
    if "sha256_of_keys" in entry:
        expected["sha256_of_keys"] = Expected(entry["sha256_of_keys"])
    for call in entry["calls"]:
        expected[call["name"]] = Expected(call["outputs"])
        for path in call["outputs"]:
            key = f"{name}|{call['name']}|{path}"
            if key in tensors:
                stored_keys.add(key)
                expected[f"{call['name']}/{path}"] = Expected(
                    tensors[key], call["atol"], call["rtol"], rel_rms=call["rel_rms"], transform=_summary
                )
    return Case(
        "models",
        name,
        partial(_run, entry),
        expected,
        advisory=entry.get("optional", False),
        stored_keys=frozenset(stored_keys),
    )


def _run(entry: Mapping[str, Any], _: Path) -> dict[str, Any]:
    target = resolve_name(entry["target"]) if entry.get("function") else _build(entry)
    results: dict[str, Any] = {}
    if isinstance(target, nn.Module):
        state = target.state_dict()
        results["state_dict"] = _describe(state)
        results["sha256_of_keys"] = hashlib.sha256("\n".join(sorted(state)).encode()).hexdigest()
    for call in entry["calls"]:
        outputs = _call(entry["name"], target, call)
        results[call["name"]] = _describe(outputs)
        results |= {f"{call['name']}/{path}": value for path, value in outputs.items()}
    return results


def _build(entry: Mapping[str, Any]) -> nn.Module:
    """The module of a case, its weights filled."""
    module = resolve_name(entry["target"])(**_decode(entry.get("kwargs", {})))
    if "pick" in entry:
        module = module[entry["pick"]]
    if entry.get("init"):
        module.init_weights()
    if entry.get("fill", True):
        fill.fill(module)
    return module.train(entry.get("mode") == "train")


def _call(case_name: str, target: Any, call: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of one call by their path, or the gradients it asks for."""
    if "attr" in call:
        return dict(_flatten(_attribute(target, call["attr"])))
    function = target if call.get("method", "__call__") == "__call__" else getattr(target, call["method"])
    args, kwargs = _decode(call.get("args", [])), _decode(call.get("kwargs", {}))
    if "set" in call:
        target.load_state_dict(target.state_dict() | _decode(call["set"]), strict=True)
    if "seed" in call:
        torch.manual_seed(call["seed"])
    gradients = call.get("grad")
    inputs = [tensor for _, tensor in _flatten([args, kwargs]) if tensor.is_floating_point()]
    for tensor in inputs if gradients else ():
        tensor.requires_grad_()
    autocast = torch.autocast("cpu", _dtype(call["autocast"])) if "autocast" in call else contextlib.nullcontext()
    with autocast, torch.set_grad_enabled(bool(gradients)):
        outputs = dict(_flatten(function(*args, **kwargs)))
    if not gradients:
        return outputs
    target.zero_grad(set_to_none=True)
    _loss(f"{case_name}/{call['name']}", outputs, gradients["outputs"]).backward()
    parameters = dict(target.named_parameters())
    grads = {f"grad/{name}": parameters[name].grad for name in gradients.get("parameters", parameters)}
    if gradients.get("inputs"):
        grads |= {f"grad_input/{index}": tensor.grad for index, tensor in enumerate(inputs)}
    return {path: grad for path, grad in grads.items() if grad is not None}


def _loss(prefix: str, outputs: Mapping[str, Tensor], paths: list[str]) -> Tensor:
    terms = []
    for path in paths:
        value = outputs[path]
        weights = fill.tensor(f"{prefix}/{path}", tuple(value.shape)).to(value)
        terms.append((value * weights).sum() / value.numel() ** 0.5)
    return sum(terms, start=torch.zeros(()))


def _attribute(target: Any, dotted: str) -> Any:
    """The attribute at a dotted path below an object."""
    for part in dotted.split("."):
        target = getattr(target, part)
    return target


def _decode(value: Any) -> Any:
    """The Python value that a JSON value stands for."""
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    for key, read in _READERS.items():
        if key in value:
            return read(value)
    return {key: _decode(item) for key, item in value.items()}


def _tensor(value: Mapping[str, Any]) -> Tensor:
    shape = tuple(value["shape"])
    tensor = fill.tensor(value["$tensor"], shape, value.get("scale", 1.0), value.get("offset", 0.0))
    if value.get("positive"):
        return tensor > 0
    return tensor.to(_dtype(value["dtype"])) if "dtype" in value else tensor


class _Namespace(dict[str, Any]):
    """A mapping whose items are attributes too, like the nodes of a configuration."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


_READERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "$tensor": _tensor,
    "$tuple": lambda value: tuple(_decode(value["$tuple"])),
    "$range": lambda value: range(value["$range"]),
    "$dtype": lambda value: _dtype(value["$dtype"]),
    "$namespace": lambda value: _Namespace(_decode(value["$namespace"])),
    "$object": lambda value: resolve_name(value["$object"]),
}


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) for every tensor of a nested result; anything else is left out."""
    if isinstance(value, Tensor):
        yield path or "out", value
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _flatten(item, f"{path}/{key}" if path else str(key))


def _describe(tensors: Mapping[str, Tensor]) -> Described:
    return {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()}


def _summary(tensor: Tensor) -> Tensor:
    """The tensor itself, or of a large one mean, deviation, root mean square, largest magnitude and first values."""
    if tensor.numel() <= MAX_WHOLE:
        return tensor.detach()
    values = tensor.detach().double().flatten()
    statistics = [values.mean(), values.std(unbiased=False), values.square().mean().sqrt(), values.abs().max()]
    return torch.cat([torch.stack(statistics), values[:N_FIRST]])
