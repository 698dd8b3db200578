"""Losses: DINO, iBOT, KoLeo, Gram of self-supervised training, with the one Sinkhorn normalisation; CLIP of dino.txt.

All of them compute in float32 whatever the dtype of their inputs, whether or not autocast is on, and work with and
without a process group.
"""

from dinov3.loss.clip_loss import memory_efficient_clip_loss
from dinov3.loss.dino_clstoken_loss import DINOLoss
from dinov3.loss.gram_loss import GramLoss
from dinov3.loss.ibot_patch_loss import iBOTPatchLoss
from dinov3.loss.koleo_loss import KoLeoLoss, KoLeoLossDistributed

__all__ = ["DINOLoss", "GramLoss", "KoLeoLoss", "KoLeoLossDistributed", "iBOTPatchLoss", "memory_efficient_clip_loss"]
