"""The k-NN core against brute force, and what it promises about blocks, parts, votes and bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from dinov3.models.neighbours import (
    Neighbours,
    knn_accuracy,
    merge_neighbours,
    nearest_neighbours,
    neighbour_vote,
    vote,
)


def _unit(rows: int, width: int) -> Tensor:
    return normalize(torch.randn(rows, width), dim=1)


@pytest.mark.parametrize("max_similarities", [10**9, 400, 30])
@pytest.mark.parametrize("k", [1, 7, 500])
def test_blocks_give_what_one_sorted_matrix_gives(max_similarities: int, k: int) -> None:
    queries, train = _unit(23, 5), _unit(101, 5)
    found = nearest_neighbours(queries, train, k, max_similarities=max_similarities)
    similarities, indices = (queries @ train.T).sort(dim=1, descending=True)
    torch.testing.assert_close(found.similarities, similarities[:, :k], atol=1e-6, rtol=0)
    assert torch.equal(found.indices, indices[:, :k])


def test_two_thousand_queries_among_twenty_thousand_are_those_of_brute_force() -> None:
    queries, train = _unit(2000, 32), _unit(20_000, 32)
    labels = torch.randint(10, (20_000,))
    found = nearest_neighbours(queries, train, 50)
    similarities = queries @ train.T
    torch.testing.assert_close(found.similarities, similarities.topk(50, dim=1).values, atol=1e-6, rtol=0)
    # Where ties, or rounding, change the order, the similarity is that of the sample all the same.
    torch.testing.assert_close(similarities.gather(1, found.indices), found.similarities, atol=1e-6, rtol=0)
    assert all(len(row.unique()) == 50 for row in found.indices)
    wanted = torch.zeros(2000, 10)
    best = similarities.topk(50, dim=1)
    wanted.scatter_add_(1, labels[best.indices], (best.values / 0.07).softmax(1))
    scores = neighbour_vote(found, labels, [50], temperature=0.07, num_classes=10)[50]
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)


def test_never_holds_more_similarities_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    topk = torch.Tensor.topk

    def counting_topk(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.numel())
        return topk(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", counting_topk)
    nearest_neighbours(_unit(50, 4), _unit(200, 4), 3, max_similarities=300)
    assert max(seen) <= 300


def test_parts_of_the_train_set_merge_into_the_whole() -> None:
    queries, train = _unit(9, 6), _unit(40, 6)
    parts, start = [], 0
    for part in train.tensor_split(7):
        found = nearest_neighbours(queries, part, 5)
        parts.append(Neighbours(found.similarities, found.indices + start))
        start += len(part)
    whole = nearest_neighbours(queries, train, 5)
    merged = merge_neighbours(parts, 5)
    assert torch.equal(merged.indices, whole.indices)
    torch.testing.assert_close(merged.similarities, whole.similarities)


def test_a_query_does_not_depend_on_the_others() -> None:
    queries, train = _unit(12, 6), _unit(40, 6)
    together = nearest_neighbours(queries, train, 4)
    alone = [nearest_neighbours(q, train, 4) for q in queries.split(1)]
    assert torch.equal(together.indices, torch.cat([n.indices for n in alone]))


def test_no_queries_give_no_neighbours() -> None:
    found = nearest_neighbours(torch.empty(0, 3), _unit(5, 3), 2)
    assert found.similarities.shape == found.indices.shape == (0, 2)
    scores = neighbour_vote(found, torch.arange(5), [1], temperature=1.0, num_classes=5)
    assert scores[1].shape == (0, 5)


def test_the_dtype_of_the_products_can_be_chosen() -> None:
    queries, train = _unit(4, 16), _unit(20, 16)
    found = nearest_neighbours(queries, train, 20, dtype=torch.bfloat16)
    assert found.similarities.dtype == torch.float32
    rounded = (queries.bfloat16() @ train.bfloat16().T).float()
    torch.testing.assert_close(found.similarities, rounded.sort(dim=1, descending=True).values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = nearest_neighbours(queries, train, 20, dtype=torch.float32)
    torch.testing.assert_close(exact.similarities, (queries @ train.T).sort(dim=1, descending=True).values)


def test_weights_are_shared_by_all_neighbours_whatever_k() -> None:
    similarities = torch.tensor([[0.9, 0.5, 0.1]])
    labels = torch.tensor([[2, 0, 2]])
    scores = vote(similarities, labels, [3, 1], temperature=0.5, num_classes=3)
    w = torch.softmax(similarities[0] / 0.5, 0)
    assert list(scores) == [1, 3]
    torch.testing.assert_close(scores[1], torch.stack([0 * w[0], 0 * w[0], w[0]])[None])
    torch.testing.assert_close(scores[3], torch.stack([w[1], 0 * w[0], w[0] + w[2]])[None])


def test_more_neighbours_asked_than_there_are_vote_as_all() -> None:
    similarities, labels = torch.randn(4, 3).sort(descending=True).values, torch.randint(0, 2, (4, 3))
    scores = vote(similarities, labels, [3, 10], temperature=1.0, num_classes=2)
    assert torch.equal(scores[3], scores[10])
    torch.testing.assert_close(scores[10].sum(1), torch.ones(4))


def test_multi_hot_rows_of_one_label_vote_like_class_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov3.models.neighbours.MAX_SIMILARITIES", 50)  # several blocks of queries
    train_labels = torch.randint(0, 4, (30,))
    found = nearest_neighbours(_unit(11, 5), _unit(30, 5), 8)
    single = neighbour_vote(found, train_labels, [2, 8], temperature=0.1, num_classes=4)
    multi = neighbour_vote(found, one_hot(train_labels, 4), [2, 8], temperature=0.1, num_classes=4)
    for k in (2, 8):
        torch.testing.assert_close(single[k], multi[k])


def test_accuracy_of_separable_clusters_is_one_and_of_swapped_labels_zero() -> None:
    centres = torch.eye(3) * 10
    train_labels, query_labels = torch.arange(3).repeat(5), torch.tensor([2, 0, 1, 1])
    train, queries = centres[train_labels] + torch.randn(15, 3) * 0.1, centres[query_labels] * 0.01
    assert knn_accuracy(queries, query_labels, train, train_labels, [1, 5]) == {1: 1.0, 5: 1.0}
    assert knn_accuracy(queries, (query_labels + 1) % 3, train, train_labels, [1, 5]) == {1: 0.0, 5: 0.0}
    assert list(knn_accuracy(queries, query_labels, train, train_labels, [5, 100])) == [5, 15]


@pytest.mark.parametrize(
    ("queries", "train", "k", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), 1, r"equal width, got \(2, 3\) and \(4, 5\)"),
        (torch.zeros(3), torch.zeros(4, 3), 1, "must be matrices"),
        (torch.zeros(2, 3), torch.zeros(0, 3), 1, "train set is empty"),
        (torch.zeros(2, 3), torch.zeros(4, 3), 0, "at least 1, got 0"),
    ],
)
def test_bad_input_is_named(queries: Tensor, train: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nearest_neighbours(queries, train, k)
