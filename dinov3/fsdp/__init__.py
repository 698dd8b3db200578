"""Activation checkpointing, compilation and sharding (FSDP2) over the units that a backbone declares."""

from dinov3.fsdp.ac_compile_parallelize import (
    ac_compile_parallelize,
    compile_modules,
    shard_module,
    synchronize_gradients,
)
from dinov3.fsdp.activation_checkpointing import checkpoint_activations
from dinov3.fsdp.initialize import init_weights

__all__ = [
    "ac_compile_parallelize",
    "checkpoint_activations",
    "compile_modules",
    "init_weights",
    "shard_module",
    "synchronize_gradients",
]
