"""SGD for the heads of a sweep: the steps of `torch.optim.SGD`, in a few operations for all heads side by side.

Torch steps one parameter group, that is one head, at a time; for small heads that takes longer than all the rest.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CACHED = 2**17  # numbers of a block: parameters, gradients and momentum stay in the processor's cache


class _Run(NamedTuple):
    """Parameters of one shape from consecutive groups: blocks `[H, ...]` that they are views of.

    `rows` are the positions of their groups.
    """

    rows: slice
    parameters: Tensor
    gradients: Tensor
    momenta: Tensor


class SweepSGD(torch.optim.SGD):
    """SGD with momentum, without weight decay.

    Groups hold equally many parameters, in the same order. Where parameters of consecutive groups follow each other in
    memory, and their gradients too, they are stepped together. The state is that of `torch.optim.SGD`, which makes the
    step if a parameter has no gradient or the groups differ in momentum.

    Args:
        params: parameter groups, each with its `lr`.
        momentum: of all groups.
    """

    def __init__(self, params: Sequence[dict[str, Any]], *, momentum: float = 0.9) -> None:
        super().__init__(params, momentum=momentum, weight_decay=0)
        self._runs: list[_Run] = []
        self._addresses: list[int] = []
        self._owns_the_state = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, also one of `torch.optim.SGD`."""
        super().load_state_dict(state_dict)
        self._owns_the_state = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step, as `torch.optim.SGD` would make it."""
        if closure is not None or not self._find_runs():
            self._owns_the_state = False
            return super().step(closure)
        momentum = self.param_groups[0]["momentum"]
        rates = torch.tensor([group["lr"] for group in self.param_groups])
        for rows, *blocks in self._runs:
            rates_of_run = rates[rows].to(blocks[0].device, blocks[0].dtype).view(-1, *[1] * (blocks[0].ndim - 1))
            n_heads = max(1, _CACHED // blocks[0][0].numel())
            parts = (block.split(n_heads) for block in (*blocks, rates_of_run))
            for parameters, gradients, momenta, lr in zip(*parts, strict=True):
                torch.add(gradients, momenta, alpha=momentum, out=momenta)
                parameters.addcmul_(momenta, lr, value=-1)
        return None

    def _find_runs(self) -> bool:
        """Arrange the parameters in blocks, anew if one of them has moved; False if they can't be stepped together."""
        momentum = self.param_groups[0]["momentum"]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        gradients = _gradients(parameters)
        if len(gradients) < len(parameters) or any(group["momentum"] != momentum for group in self.param_groups):
            return False
        addresses = [tensor.data_ptr() for tensor in (*parameters, *gradients)]
        if addresses != self._addresses or not self._owns_the_state:
            self._runs = [
                self._make_run(column, rows)
                for column in zip(*(group["params"] for group in self.param_groups), strict=True)
                for rows in _rows_of_blocks(column)
            ]
            self._addresses, self._owns_the_state = addresses, True
        return True

    def _make_run(self, column: Sequence[Tensor], rows: slice) -> _Run:
        members = column[rows]
        known = [self.state[parameter].get("momentum_buffer") for parameter in members]
        momenta = torch.stack([torch.zeros_like(p) if m is None else m for p, m in zip(members, known, strict=True)])
        for parameter, momentum in zip(members, momenta, strict=True):
            self.state[parameter]["momentum_buffer"] = momentum
        return _Run(rows, _block([p.detach() for p in members]), _block(_gradients(members)), momenta)


def _rows_of_blocks(column: Sequence[Tensor]) -> Iterator[slice]:
    """Rows of a column whose parameters, and gradients, follow each other in memory."""
    gradients = _gradients(column)
    start = 0
    for row in range(1, len(column) + 1):
        if row == len(column) or not (
            _is_next(column[row - 1], column[row]) and _is_next(gradients[row - 1], gradients[row])
        ):
            yield slice(start, row)
            start = row


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _is_next(before: Tensor, after: Tensor) -> bool:
    """Whether a tensor of the same kind begins where another one ends, in one piece of memory."""
    return (
        (before.shape, before.dtype) == (after.shape, after.dtype)
        and before.is_contiguous()
        and after.is_contiguous()
        and before.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
        and before.data_ptr() + before.nbytes == after.data_ptr()
    )


def _block(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors that follow each other in memory as one `[H, ...]`, a view."""
    first = tensors[0]
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))
