"""Losses of self-supervised training: DINO, iBOT, KoLeo, Gram, and the one Sinkhorn normalisation.

All of them compute in float32 whatever the dtype of their inputs, whether or not autocast is on, and work with and
without a process group.
"""

from dinov3.loss.dino_clstoken_loss import DINOLoss
from dinov3.loss.gram_loss import GramLoss
from dinov3.loss.ibot_patch_loss import iBOTPatchLoss
from dinov3.loss.koleo_loss import KoLeoLoss, KoLeoLossDistributed

__all__ = ["DINOLoss", "GramLoss", "KoLeoLoss", "KoLeoLossDistributed", "iBOTPatchLoss"]
