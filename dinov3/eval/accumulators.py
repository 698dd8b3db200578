"""Collecting the results of single samples during an evaluation, to save them afterwards."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from dinov3.distributed import gather_all_tensors


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
            torch.cat(_equal_width(gather_all_tensors(torch.cat(_equal_width(rows)))))
            for rows in (self._index, self._preds, self._target)
        )
        order = index.argsort(stable=True)
        first = torch.ones(len(order), dtype=torch.bool)
        first[1:] = index[order][1:] != index[order][:-1]
        return {"preds": preds[order[first]], "target": target[order[first]]}


def _equal_width(rows: list[Tensor]) -> list[Tensor]:
    """Fill lists `[B, L]` up with -1 to the longest."""
    if rows[0].ndim != 2 or len({r.shape[1] for r in rows}) == 1:
        return rows
    longest = max(r.shape[1] for r in rows)
    return [pad(r, (0, longest - r.shape[1]), value=-1) for r in rows]
