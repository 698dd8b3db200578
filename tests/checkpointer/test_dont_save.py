import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dinov3.checkpointer import register_dont_save_hooks


def build() -> nn.ModuleDict:
    return nn.ModuleDict({"frozen": nn.Linear(2, 2), "head": nn.Linear(2, 1)})


def test_keys_vanish_and_are_not_missed() -> None:
    model = build()
    register_dont_save_hooks(model, ["frozen.weight", "frozen.bias"])
    assert set(model.state_dict()) == {"head.weight", "head.bias"}
    other = build()
    register_dont_save_hooks(other, ["frozen.weight", "frozen.bias"])
    before = other["frozen"].weight.clone()
    result = other.load_state_dict(model.state_dict(), strict=True)
    assert result.missing_keys == result.unexpected_keys == []
    assert other["frozen"].weight.equal(before)
    assert other["head"].weight.equal(model["head"].weight)


def test_as_a_part_of_a_larger_module() -> None:
    outer = nn.Sequential(nn.Sequential(build()))
    register_dont_save_hooks(outer[0][0], ["frozen.weight"])
    state = outer.state_dict()
    assert set(state) == {"0.0.frozen.bias", "0.0.head.weight", "0.0.head.bias"}
    outer.load_state_dict(state)


def test_keys_that_are_there_are_loaded() -> None:
    source, model = build(), build()
    state = source.state_dict()
    register_dont_save_hooks(model, ["frozen.weight", "frozen.bias"])
    model.load_state_dict(state)
    assert model["frozen"].weight.equal(source["frozen"].weight)


def test_a_failed_load_leaves_nothing_behind() -> None:
    model = build()
    register_dont_save_hooks(model, ["frozen.weight", "frozen.bias"])
    state = model.state_dict()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="head.bias") as failed:
            model.load_state_dict({"head.weight": torch.zeros(1, 2)})
        assert "frozen" not in str(failed.value)
        model.load_state_dict(state)


def test_names_of_checkpoint_wrappers_do_not_matter() -> None:
    model = build()
    model["frozen"] = checkpoint_wrapper(model["frozen"])
    register_dont_save_hooks(model, ["frozen.weight", "frozen.bias"])
    state = model.state_dict()
    assert set(state) == {"head.weight", "head.bias"}
    model.load_state_dict(state)
