"""Moved to `dinov3.optim.lr_schedulers`."""

from dinov3.optim.lr_schedulers import WarmupOneCycleLR, build_scheduler

__all__ = ["WarmupOneCycleLR", "build_scheduler"]
