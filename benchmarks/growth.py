"""Time and memory of a forward pass against the side of the image, and against the batch, one varied at a time.

Outside attention both should grow with the number of pixels.
"""

from benchmarks.frame.bench import Bench
from benchmarks.models import forward_makers

NAMES = ("ViT-S", "ConvNeXt-T")
_SIDES = {"cpu": (128, 256, 512, 768, 1024, 1536)}
_SIDES_ACCELERATOR = (128, 256, 512, 1024, 1536, 2048)
_BATCHES = {"cpu": (1, 2, 4, 8, 16, 32)}
_BATCHES_ACCELERATOR = (1, 4, 16, 64, 128, 256)


def run(bench: Bench) -> None:
    """Both sweeps; points that take too long are left out."""
    kind = bench.device.type
    sides, batches = _SIDES.get(kind, _SIDES_ACCELERATOR), _BATCHES.get(kind, _BATCHES_ACCELERATOR)
    n_points = 2 if bench.quick else None
    for name in NAMES:
        for side in sides[:n_points]:
            _measure(bench, name, side, 1, "side", side)
        for batch in batches[:n_points]:
            _measure(bench, name, 224, batch, "batch", batch)


def _measure(bench: Bench, name: str, side: int, batch: int, axis: str, x: int) -> None:
    makers = forward_makers(name, side, batch, bench.device)
    point, table = f"{name}, {side} px, batch {batch}", f"cost growth with the {axis}"
    time, memory = f"growth with {axis}: {point}, time", f"growth with {axis}: {point}, memory"
    bench.time(time, makers, table=table, series=name, x=x)
    if bench.known(time) is not None:  # else it takes too long
        bench.memory(memory, makers, table=table, series=name, x=x)
