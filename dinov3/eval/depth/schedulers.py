"""Moved to `dinov3.optim.lr_schedulers`."""

from dinov3.optim.lr_schedulers import WarmupMultiStepLR, WarmupOneCycleLR, build_scheduler

__all__ = ["WarmupMultiStepLR", "WarmupOneCycleLR", "build_scheduler"]
