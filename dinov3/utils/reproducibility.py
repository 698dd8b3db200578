"""Seeds of the random generators."""

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
