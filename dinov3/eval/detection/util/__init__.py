"""Boxes and padded batches."""
