"""Exact nearest neighbours and their weighted vote: the core of every k-NN evaluation.

Plain functions of tensors: no process group, no data set, no configuration. `dinov3.eval.knn` runs them over data sets;
the online monitor of the training runs them on the features it holds. Queries may be spread over processes in any way:
a query's neighbours depend on that query and the train set alone, so the result does not depend on the number of
processes. A train set held in parts is searched part by part, and `merge_neighbours` makes one list of the parts.

Shapes: Q queries, N train samples, D channels, K neighbours kept per query, C classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Largest number of similarities held at a time: 256 MiB in float32.
MAX_SIMILARITIES = 2**26
# Rows of the train set per product: enough to keep a fast device busy, while many queries still fit beside them.
_TRAIN_ROWS = 2**16


class Neighbours(NamedTuple):
    """The nearest train samples of each query, most similar first.

    Attributes:
        similarities: inner products, float32 `[Q, K]`, descending.
        indices: row numbers in the train set, int64 `[Q, K]`.
    """

    similarities: Tensor
    indices: Tensor


@torch.no_grad()
def nearest_neighbours(
    queries: Tensor,
    train_features: Tensor,
    k: int,
    *,
    dtype: torch.dtype | None = None,
    max_similarities: int = MAX_SIMILARITIES,
) -> Neighbours:
    """The `k` train features with the largest inner product with each query (all of them if there are fewer than `k`).

    The search is exact. It goes over blocks of queries and blocks of train features and keeps a running list of the
    best, so that memory is bounded whatever the sizes. Train features on another device than the queries (because they
    are too many for it, say) are moved block by block.

    Args:
        queries: `[Q, D]`; with L2-normalised rows the inner product is a cosine.
        train_features: `[N, D]`.
        k: neighbours to keep, at least 1.
        dtype: what the products are computed in; None means that of the queries, or of autocast where that is on.
        max_similarities: bound on the number of similarities held at a time.

    Raises:
        ValueError: the widths differ, there is nothing to search in, or `k` is below 1.
    """
    _check_searchable(queries, train_features, k)
    k = min(k, len(train_features))
    train_rows = min(len(train_features), _TRAIN_ROWS, max(k, max_similarities))
    query_rows = max(1, max_similarities // (train_rows + 2 * k))
    parts = [  # one part, an empty one, if there is no query
        _search(block, train_features, k, dtype=dtype, train_rows=train_rows) for block in queries.split(query_rows)
    ]
    return Neighbours(torch.cat([p.similarities for p in parts]), torch.cat([p.indices for p in parts]))


def _check_searchable(queries: Tensor, train_features: Tensor, k: int) -> None:
    if queries.ndim != 2 or train_features.ndim != 2 or queries.shape[1] != train_features.shape[1]:
        raise ValueError(
            "queries [Q, D] and train features [N, D] must be matrices of equal width, got "
            f"{tuple(queries.shape)} and {tuple(train_features.shape)}"
        )
    if len(train_features) == 0:
        raise ValueError("the train set is empty: there are no neighbours to find")
    if k < 1:
        raise ValueError(f"the number of neighbours must be at least 1, got {k}")


def _search(
    queries: Tensor, train_features: Tensor, k: int, *, dtype: torch.dtype | None, train_rows: int
) -> Neighbours:
    """Neighbours of one block of queries."""
    best: Neighbours | None = None
    for i, block in enumerate(train_features.split(train_rows)):
        similarities = _similarities(queries, block.to(queries.device, non_blocking=True), dtype)  # [Q, n]
        values, rows = similarities.topk(min(k, len(block)), dim=1)
        found = Neighbours(values.float(), rows + i * train_rows)
        best = found if best is None else merge_neighbours([best, found], k)
    assert best is not None  # the train set isn't empty
    return best


def _similarities(queries: Tensor, block: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return queries @ block.to(queries.dtype).T
    with torch.autocast(queries.device.type, enabled=False):
        return queries.to(dtype) @ block.to(dtype).T


def merge_neighbours(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """The best `k` of several lists of neighbours of the same queries (their indices counted from one origin)."""
    similarities = torch.cat([part.similarities for part in parts], dim=1)
    indices = torch.cat([part.indices for part in parts], dim=1)
    values, order = similarities.topk(min(k, similarities.shape[1]), dim=1)
    return Neighbours(values, indices.gather(1, order))


@torch.no_grad()
def vote(
    similarities: Tensor, labels: Tensor, ks: Sequence[int], *, temperature: float, num_classes: int
) -> dict[int, Tensor]:
    """Class scores of each query from its neighbours, for several numbers of neighbours at once.

    With `w = softmax(similarities / temperature)` over all K neighbours given (not over the first k), the score of
    class c is `sum_{j<k} w_j y_j[c]`. The scores of the largest k sum to one over the classes, those of a smaller k to
    less.

    Args:
        similarities: `[Q, K]`, descending.
        labels: of the neighbours: class numbers, int64 `[Q, K]`, or multi-hot rows `[Q, K, C]`.
        ks: numbers of neighbours that vote; what exceeds K counts as K.
        temperature: of the softmax; small values let the nearest neighbours decide.
        num_classes: C.

    Returns:
        `{k: scores}`, float32 `[Q, C]`, in ascending order of k.
    """
    weights = torch.softmax(similarities.float() / temperature, dim=1)
    scores = weights.new_zeros(len(weights), num_classes)
    result: dict[int, Tensor] = {}
    counted = 0
    for k in sorted(set(ks)):
        new = slice(counted, k)  # what the next smaller k has not counted
        if labels.ndim == 2:
            scores = scores.scatter_add(1, labels[:, new], weights[:, new])
        else:
            scores = scores + torch.einsum("qk,qkc->qc", weights[:, new], labels[:, new].to(weights.dtype))
        result[k] = scores
        counted = k
    return result


@torch.no_grad()
def neighbour_vote(
    neighbours: Neighbours, train_labels: Tensor, ks: Sequence[int], *, temperature: float, num_classes: int
) -> dict[int, Tensor]:
    """`vote` with the labels of the train set, class numbers `[N]` or multi-hot rows `[N, C]`; bounded memory."""
    similarities, indices = neighbours
    table = train_labels.to(indices.device)
    labels_per_query = indices.shape[1] * (num_classes if table.ndim == 2 else 1)
    rows = max(1, MAX_SIMILARITIES // max(1, labels_per_query))
    parts = [
        vote(s, table[i], ks, temperature=temperature, num_classes=num_classes)
        for s, i in zip(similarities.split(rows), indices.split(rows), strict=True)
    ]
    return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}


@torch.no_grad()
def knn_accuracy(
    queries: Tensor,
    query_labels: Tensor,
    train_features: Tensor,
    train_labels: Tensor,
    ks: Sequence[int] = (10, 20, 100, 200),
    *,
    temperature: float = 0.07,
) -> dict[int, float]:
    """Top-1 accuracy (0 to 1) per k of the weighted k-NN classifier, for features that need not be normalised.

    Numbers of neighbours beyond the size of the train set become that size, as in the evaluation. This is the
    classifier of DINO (Caron et al. 2021, section 4.1), after Wu et al. 2018.

    Args:
        queries: `[Q, D]`.
        query_labels: class numbers, `[Q]`.
        train_features: `[N, D]`.
        train_labels: class numbers, `[N]`.
        ks: numbers of neighbours that vote.
        temperature: of the softmax over cosines.
    """
    ks = sorted({min(k, len(train_features)) for k in ks})
    queries, train_features = (normalize(x.float(), dim=1) for x in (queries, train_features))
    found = nearest_neighbours(queries, train_features, max(ks))
    num_classes = int(max(query_labels.max(), train_labels.max())) + 1
    scores = neighbour_vote(found, train_labels, ks, temperature=temperature, num_classes=num_classes)
    return {k: (s.argmax(1) == query_labels.to(s.device)).float().mean().item() for k, s in scores.items()}
