"""Backbones: the vision transformer and ConvNeXt, what they have in common, and how to build them."""
