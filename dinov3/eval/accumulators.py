"""Collecting the results of single samples during an evaluation, to save them afterwards."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dinov3.distributed import gather_all_tensors
from dinov3.eval.data import equal_widths


class ResultsAccumulator:
    """Predictions and targets of all processes, put in the order of the samples."""

    def __init__(self) -> None:
        self._index: list[Tensor] = []
        self._preds: list[Tensor] = []
        self._target: list[Tensor] = []

    def update(self, preds: Tensor, target: Tensor, index: Tensor) -> None:
        """Add a batch.

        Args:
            preds: `[B, ...]`.
            target: `[B]` or `[B, ...]`; lists padded with -1 may have different lengths in different batches.
            index: number of each sample, `[B]`.
        """
        # On the CPU: results of a whole data set must not fill the device.
        self._preds.append(preds.detach().cpu())
        self._target.append(target.detach().cpu())
        self._index.append(index.detach().cpu())

    def accumulate(self) -> Mapping[str, Tensor]:
        """`{"preds": [N, ...], "target": [N, ...]}`, ascending by sample number; a collective of the world.

        A sample that several processes have counted appears once.
        """
        if not self._index:
            raise ValueError("no result was added: there is nothing to accumulate")
        index, preds, target = (
            torch.cat(equal_widths(gather_all_tensors(torch.cat(equal_widths(rows, -1))), -1))
            for rows in (self._index, self._preds, self._target)
        )
        order = index.argsort(stable=True)
        first = torch.ones(len(order), dtype=torch.bool)
        first[1:] = index[order][1:] != index[order][:-1]
        return {"preds": preds[order[first]], "target": target[order[first]]}
