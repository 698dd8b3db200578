"""The detector: backbone with windows, encoder, proposals, decoder, heads. Pure model code."""

from dinov3.eval.detection.models.processor import build_from_head

__all__ = ["build_from_head"]
