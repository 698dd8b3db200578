"""Every backbone beside timm and transformers, for users who choose: milliseconds at batch 1, images/s, peak memory.

At 224 and 512 pixels; eager and compiled in float32, on an accelerator in bfloat16 too. Parameters are of that dtype:
nothing is cast on the way.
"""

import torch

from benchmarks.frame.bench import Bench
from benchmarks.models import MODELS, forward_makers

SIDES = (224, 512)
_BATCHES = {"cpu": 8}
_BATCH_ACCELERATOR = 64


def run(bench: Bench) -> None:
    """All models; what takes too long is left out."""
    on_cpu = bench.device.type == "cpu"
    batch = _BATCHES.get(bench.device.type, _BATCH_ACCELERATOR)
    for name in ("ViT-S",) if bench.quick else MODELS:
        for side in SIDES[:1] if bench.quick else SIDES:
            for dtype in (torch.float32,) if on_cpu else (torch.float32, torch.bfloat16):
                for compiled in (False,) if bench.quick else (False, True):
                    _measure(bench, name, side, batch, dtype, compiled)


def _measure(bench: Bench, name: str, side: int, batch: int, dtype: torch.dtype, compiled: bool) -> None:
    how = f"{name}, {side} px, {str(dtype).removeprefix('torch.')}, {'compiled' if compiled else 'eager'}"
    targets = {"cpu": None}.get(bench.device.type, 1.0)
    one, many = (forward_makers(name, side, n, bench.device, compiled=compiled, dtype=dtype) for n in (1, batch))
    row = bench.time(f"{how}, batch 1", one, table="zoo, milliseconds of one image", target=targets)
    row = row or bench.known(f"{how}, batch 1")
    expected_s = None if row is None else batch * row.ours / 1e3
    many_name = f"{how}, batch {batch}"
    bench.time(many_name, many, table="zoo, images/s", target=targets, items=batch, expected_s=expected_s)
    if not compiled and (expected_s is None or expected_s <= bench.limit_s):
        bench.memory(f"{many_name}, peak memory", many, table="zoo, peak memory", target=1.0)
