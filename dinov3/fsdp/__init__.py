"""Activation checkpointing, compilation and sharding (FSDP2) over the units that a backbone declares."""

from dinov3.fsdp.ac_compile_parallelize import ac_compile_parallelize, synchronize_gradients
from dinov3.fsdp.initialize import init_weights

__all__ = ["ac_compile_parallelize", "init_weights", "synchronize_gradients"]
