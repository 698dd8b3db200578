"""Where a depth training left off."""

from dinov3.eval.flat_checkpoints import find_latest_checkpoint

__all__ = ["find_latest_checkpoint"]
