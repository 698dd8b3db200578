"""The contrastive loss under its published path; its owner is `dinov3.loss.clip_loss`."""

from dinov3.loss.clip_loss import MemoryEfficientClipLoss, memory_efficient_clip_loss

__all__ = ["MemoryEfficientClipLoss", "memory_efficient_clip_loss"]
