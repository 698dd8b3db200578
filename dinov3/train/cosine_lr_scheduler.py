"""Moved to `dinov3.optim.schedules`."""

from dinov3.optim.schedules import CosineScheduler, linear_warmup_cosine_decay

__all__ = ["CosineScheduler", "linear_warmup_cosine_decay"]
