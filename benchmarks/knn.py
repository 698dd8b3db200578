"""Time and memory of the exact k-NN search.

Neighbours of the queries, and the vote of 10, 20, 100 and 200 of them, as `dinov3.eval.knn` finds them: 50,000 queries
against 200,000 x 384 in batches of 256, as they come from a data loader, and all at once, whose memory beyond features
and labels is held against a limit; and one batch of 2,000 beside a search that keeps all similarities, and beside the
time of the matrix product alone. The neighbours of the first queries are compared with those of that search.
"""

import time
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.frame.bench import Bench
from benchmarks.frame.measure import PeakMemory, synchronize
from dinov3.eval.knn import KnnModule

TABLE = "k-NN"
KS = (10, 20, 100, 200)
LIMIT_GB = 2.0
PRODUCT_TARGET = 0.6
"""On an accelerator: part of the matrix product's rate that the whole search should reach."""
_N_QUERIES, _N_TRAIN, _WIDTH = 50_000, 200_000, 384
_BATCH, _N_CHECKED, _N_AT_ONCE, _N_CLASSES, _TEMPERATURE = 256, 500, 2000, 1000, 0.07


def make_features(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Unit vectors, float32 `[n, D]`."""
    features = torch.empty(count, _WIDTH)
    for block in features.split(10_000):
        block.copy_(normalize(torch.randn(block.shape, generator=generator), dim=1))
    return features.to(device)


def plain_search(queries: Tensor, train: Tensor, labels: Tensor) -> dict[int, Tensor]:
    """The votes, with all similarities in memory."""
    similarities, indices = (queries @ train.T).topk(max(KS), dim=1)
    weights = torch.softmax(similarities / _TEMPERATURE, dim=1)
    found = labels[indices]
    votes = weights.new_zeros(len(KS), len(queries), _N_CLASSES)
    return {k: votes[i].scatter_add_(1, found[:, :k], weights[:, :k]) for i, k in enumerate(KS)}


def check(knn: KnnModule, queries: Tensor, train: Tensor) -> None:
    """Raise unless the neighbours are those of a search that keeps all similarities, up to ties."""
    found, _ = knn.compute_neighbors(queries)
    wanted = (queries @ train.T).topk(found.shape[1], dim=1).values
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def run(bench: Bench) -> None:
    """Memory and time of the whole search; time of one batch."""
    n_train, n_queries = (20_000, 5_000) if bench.quick else (_N_TRAIN, _N_QUERIES)
    generator = torch.Generator().manual_seed(0)
    train, queries = (make_features(n, generator, bench.device) for n in (n_train, n_queries))
    labels = torch.randint(_N_CLASSES, (n_train,), generator=generator).to(bench.device)
    device = str(bench.device)
    knn = KnnModule(
        train_features=train, train_labels=labels, device=device, ks=KS, T=_TEMPERATURE, num_classes=_N_CLASSES
    )
    check(knn, queries[:_N_CHECKED], train)
    for size in (_BATCH, n_queries):
        name = f"k-NN, {n_queries} queries, {size} at a time, {n_train} x {_WIDTH}"
        if bench.wants(f"{name}: memory") or bench.wants(f"{name}: time"):
            seconds, gigabytes = search_all(knn, queries.split(size), bench.device)
            limit = {"ours": [gigabytes], f"limit of {LIMIT_GB:g} GB": [LIMIT_GB]}
            bench.record(f"{name}: memory", limit, table=TABLE, unit="GB", target=1.0)
            bench.record(f"{name}: time", {"ours": [n_queries / seconds]}, table=TABLE, unit="queries/s")
    block = queries[:_N_AT_ONCE]
    bench.time(
        f"k-NN, a batch of {len(block)}, {n_train} x {_WIDTH}",
        {"ours": lambda: partial(knn, block), "all similarities": lambda: partial(plain_search, block, train, labels)},
        table=TABLE,
        target=1.0,
    )
    bench.time(
        f"k-NN, a batch of {len(block)}, {n_train} x {_WIDTH}, beside its matrix product",
        {"ours": lambda: partial(knn, block), "the matrix product alone": lambda: partial(product, block, train)},
        table=TABLE,
        target=None if bench.device.type == "cpu" else PRODUCT_TARGET,
    )


def product(queries: Tensor, train: Tensor) -> None:
    """The similarities, in blocks that are let go."""
    for block in train.split(20_000):
        queries @ block.T


def search_all(knn: KnnModule, batches: tuple[Tensor, ...], device: torch.device) -> tuple[float, float]:
    """Seconds, and the peak of memory [GB] beyond what was held before."""
    start = time.perf_counter()
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
    with PeakMemory() as memory, torch.no_grad():
        for batch in batches:
            knn(batch)
    synchronize(device)
    seconds = time.perf_counter() - start
    if device.type != "cpu":
        return seconds, (torch.accelerator.max_memory_allocated() - before) / 1e9
    return seconds, memory.bytes / 1e9
