"""How many rows of a huge matrix losses work on at a time."""

import torch

# Largest temporary, in elements. On a CPU it is 4 MiB in float32: what one operation writes, the next reads from the
# caches, and 4 rows of 262,144 prototypes are enough for sums over rows. An accelerator wants fewer and larger kernels:
# 16 MiB.
CPU_ELEMENTS = 1 << 20
ACCELERATOR_ELEMENTS = 1 << 22


def rows_per_chunk(n_columns: int, device: torch.device) -> int:
    """Rows of `n_columns` numbers that fit into a chunk, at least 1."""
    elements = CPU_ELEMENTS if device.type == "cpu" else ACCELERATOR_ELEMENTS
    return max(1, elements // max(1, n_columns))
