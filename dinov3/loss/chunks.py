"""How many rows of a huge matrix losses work on at a time."""

# Largest temporary: 16 MiB in float32. Much larger ones fall out of CPU caches and cost memory; much smaller ones cost
# kernel launches on a GPU.
CHUNK_ELEMENTS = 1 << 22


def rows_per_chunk(n_columns: int) -> int:
    """Rows of `n_columns` numbers that fit into a chunk, at least 1."""
    return max(1, CHUNK_ELEMENTS // max(1, n_columns))
