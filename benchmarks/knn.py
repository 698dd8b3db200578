"""Time and memory of the exact k-NN search, as a Markdown table.

    python -m benchmarks.knn [--queries 50000] [--train 200000] [--width 384] [--threads 2]

Neighbours of the queries, and the vote of 10, 20, 100 and 200 of them, as `dinov3.eval.knn` finds them,
in batches of 256 queries as they come from a data loader, and all at once. Memory is the highest resident size of the
process beyond what it had with features and labels in memory. The first queries are compared with a search that keeps
all similarities.
"""

import argparse
import resource
import sys
import threading
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov3.eval.knn import KnnModule

KS = (10, 20, 100, 200)
_BATCH, _N_CHECKED, _N_CLASSES = 256, 500, 1000


def make_features(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Unit vectors, float32 `[n, D]`."""
    features = torch.empty(count, width)
    for block in features.split(10_000):
        block.copy_(normalize(torch.randn(block.shape, generator=generator), dim=1))
    return features


class PeakMemory:
    """The highest resident size of this process while a block runs, beyond that at its start [bytes]."""

    def __enter__(self) -> "PeakMemory":
        self._start = self._peak = _resident()
        self._running = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()
        self.bytes = self._peak - self._start

    def _watch(self) -> None:
        while self._running:
            self._peak = max(self._peak, _resident())
            time.sleep(0.005)


def _resident() -> int:
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check(knn: KnnModule, queries: Tensor, train: Tensor) -> None:
    """Raise unless the neighbours are those of a search that keeps all similarities, up to ties."""
    found, _ = knn.compute_neighbors(queries)
    wanted = (queries @ train.T).topk(found.shape[1], dim=1).values
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--train", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    train, queries = (make_features(n, args.width, generator) for n in (args.train, args.queries))
    labels = torch.randint(_N_CLASSES, (args.train,), generator=generator)
    knn = KnnModule(train_features=train, train_labels=labels, device="cpu", ks=KS, T=0.07, num_classes=_N_CLASSES)
    check(knn, queries[:_N_CHECKED], train)
    print(f"torch {torch.__version__}, {args.threads} threads: {args.queries} queries, {args.train} x {args.width}\n")
    print("| queries at a time | time, s | queries/s | peak memory beyond the features, GB |\n|---|---|---|---|")
    for size in (_BATCH, args.queries):
        start = time.perf_counter()
        with PeakMemory() as memory, torch.no_grad():
            for block in queries.split(size):
                knn(block)
        seconds = time.perf_counter() - start
        print(f"| {size} | {seconds:.1f} | {args.queries / seconds:.0f} | {memory.bytes / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
