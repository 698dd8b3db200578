"""Seeds of the random generators."""

import hashlib
import importlib.util
import random

import torch


def fix_random_seeds(seed: int = 31) -> None:
    """Seed torch (the CPU and every accelerator), Python's `random`, and NumPy if it is installed."""
    torch.manual_seed(seed)
    random.seed(seed)
    if importlib.util.find_spec("numpy") is not None:
        import numpy as np

        np.random.seed(seed % 2**32)


def derived_seed(*key: int | str) -> int:
    """A seed that is a function of the key: keys that differ in anything give unrelated seeds.

    It has 32 bits, because torch's CPU generator ignores higher ones.
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "little")
