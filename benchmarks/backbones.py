"""Features of the backbones, eager, beside timm and transformers: 224, 512 and 1024 pixels, one image and 32.

The wanted ratio is 1.1 where less than 85 % of the time of timm's model goes to matrix products, else 1: what they take
cannot be saved.
"""

from functools import cache, partial

from benchmarks.frame.bench import Bench
from benchmarks.models import MODELS, forward_makers, make_forward, product_share

SIDES, BATCHES = (224, 512, 1024), (1, 32)
_SHARE, _TARGET_BELOW, _TARGET_ABOVE, _TARGET_ACCELERATOR = 0.85, 1.1, 1.0, 1.2


def run(bench: Bench) -> None:
    """All models, sides and batches whose call is short enough."""

    @cache
    def target(name: str, side: int) -> float:
        if bench.device.type != "cpu":
            return _TARGET_ACCELERATOR
        share = product_share(make_forward("timm", name, side, 1, bench.device))
        print(f"    {name}, {side} px: {share:.0%} of timm's time are matrix products", flush=True)
        return _TARGET_BELOW if share < _SHARE else _TARGET_ABOVE

    for name in MODELS:
        per_pixel_s = 0.0
        for side in SIDES[:1] if bench.quick else SIDES:
            for batch in BATCHES[:1] if bench.quick else BATCHES:
                point = f"{name}, {side} px, batch {batch}"
                if bench.wants(point):
                    bench.time(
                        point,
                        forward_makers(name, side, batch, bench.device),
                        table="backbone inference",
                        target=partial(target, name, side),
                        items=batch,
                        expected_s=per_pixel_s * batch * side**2,
                    )
                row = bench.known(point)
                if row is not None:
                    per_pixel_s = 1 / (row.ours * side**2)
