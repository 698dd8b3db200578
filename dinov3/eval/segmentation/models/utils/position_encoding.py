"""Moved to `dinov3.layers.sine_position_encoding`."""

from dinov3.layers.sine_position_encoding import PositionEmbeddingSine

__all__ = ["PositionEmbeddingSine"]
