"""The optimizer of the sweep makes the steps of torch's, and leaves the same state."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov3.eval import sweep_sgd
from dinov3.eval.linear_heads import AllClassifiers, setup_linear_classifiers
from dinov3.eval.sweep_sgd import SweepSGD

Groups = list[dict[str, Any]]


def _heads() -> tuple[AllClassifiers, Groups]:
    tokens = [(torch.zeros(1, 2, 5), torch.zeros(1, 5))] * 2
    return setup_linear_classifiers(tokens, [1, 2], [0.1, 0.02, 0.5], 256, 4)


def _train(heads: AllClassifiers, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = [(torch.randn(6, 2, 5, generator=generator), torch.randn(6, 5, generator=generator))] * 2
        heads.loss_and_gradients(tokens, torch.randint(4, (6,), generator=generator))
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.8
            group["momentum"] = 0.9 - 0.1 * (step % 2)


def _both(train: Callable[[AllClassifiers, Groups, type[torch.optim.SGD]], None]) -> list[list[Tensor]]:
    torch.manual_seed(0)
    heads, groups = _heads()
    theirs = copy.deepcopy(heads)
    their_groups = [
        {**group, "params": list(head.parameters())}
        for group, head in zip(groups, theirs.classifiers_dict.values(), strict=True)
    ]
    train(heads, groups, SweepSGD)
    train(theirs, their_groups, torch.optim.SGD)
    return [list(heads.parameters()), list(theirs.parameters())]


@pytest.mark.parametrize("cached", [1, 2**17], ids=["one head at a time", "all heads"])
def test_steps_are_those_of_torch(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_sgd, "_CACHED", cached)

    def train(heads: AllClassifiers, groups: Groups, kind: type[torch.optim.SGD]) -> None:
        optimizer = kind(groups, momentum=0.9)
        _train(heads, optimizer, range(5))
        if isinstance(optimizer, SweepSGD):
            assert [run.rows for run in optimizer._runs] == [slice(0, 3), slice(3, 6)] * 2

    for ours, theirs in zip(*_both(train), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_state_goes_to_torch_and_back() -> None:
    def train(heads: AllClassifiers, groups: Groups, kind: type[torch.optim.SGD]) -> None:
        del kind
        _train(heads, first := torch.optim.SGD(groups, momentum=0.9), range(2))
        second = SweepSGD(groups)
        second.load_state_dict(first.state_dict())
        _train(heads, second, range(2, 4))
        third = torch.optim.SGD(groups)
        third.load_state_dict(second.state_dict())
        _train(heads, third, range(4, 6))

    def plain(heads: AllClassifiers, groups: Groups, kind: type[torch.optim.SGD]) -> None:
        _train(heads, kind(groups, momentum=0.9), range(6))

    for ours, theirs in zip(_both(train)[0], _both(plain)[1], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", ["scattered", "a late gradient", "several momenta"])
def test_other_parameters_are_stepped_too(case: str) -> None:
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(3)) for _ in range(2)]
    theirs = copy.deepcopy(mine)
    stepped = []
    for parameters, kind in ((mine, SweepSGD), (theirs, torch.optim.SGD)):
        optimizer = kind([{"params": [p], "lr": 0.1} for p in parameters], momentum=0.9)
        for step in range(3):
            for i, parameter in enumerate(parameters):
                late = case == "a late gradient" and i == 1 and step == 0
                parameter.grad = None if late else torch.full((3,), float(step + i))
                if case == "several momenta" and step == 1:
                    optimizer.param_groups[i]["momentum"] = 0.5 + 0.1 * i
            optimizer.step()
        stepped.append(parameters)
    for ours, other in zip(*stepped, strict=True):
        torch.testing.assert_close(ours, other)
