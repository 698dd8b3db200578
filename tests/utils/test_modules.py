"""Walking over modules."""

import pytest
from torch import nn

from dinov3.utils import count_parameters, has_batchnorms, named_apply, named_replace


def make_tree() -> nn.Module:
    return nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 3), nn.GELU()), "b": nn.Linear(3, 1)})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["a.0", "a.1", "a", "b"]),
        ({"depth_first": False}, ["a", "a.0", "a.1", "b"]),
        ({"include_root": True}, ["a.0", "a.1", "a", "b", ""]),
        ({"include_root": True, "depth_first": False, "name": "r"}, ["r", "r.a", "r.a.0", "r.a.1", "r.b"]),
    ],
)
def test_named_apply_order(options: dict, expected: list[str]) -> None:
    seen: list[str] = []
    root = make_tree()
    assert named_apply(lambda module, name: seen.append(name), root, **options) is root
    assert seen == expected


def test_named_replace_sets_what_the_function_returns() -> None:
    def replace(module: nn.Module, name: str) -> nn.Module:
        return nn.Identity() if name == "a.1" else module

    root = make_tree()
    linear = root["b"]
    assert named_replace(replace, root) is root
    assert isinstance(root["a"][1], nn.Identity)
    assert root["b"] is linear


def test_named_replace_can_replace_the_root() -> None:
    new = named_replace(lambda module, name: nn.Identity() if name == "" else module, make_tree(), include_root=True)
    assert isinstance(new, nn.Identity)


def test_count_parameters_counts_tied_weights_once() -> None:
    root = make_tree()
    assert count_parameters(root) == 2 * 3 + 3 + 3 + 1
    root["again"] = root["b"]
    assert count_parameters(root) == 2 * 3 + 3 + 3 + 1


def test_has_batchnorms() -> None:
    assert not has_batchnorms(nn.Sequential(nn.LayerNorm(3), nn.GroupNorm(1, 3)))
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        assert has_batchnorms(nn.Sequential(nn.Sequential(kind(3))))
