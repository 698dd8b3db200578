"""Activation checkpointing of a backbone's units: trade recomputation for memory."""

from functools import partial
from typing import Any

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts


def saved_operations() -> set[Any]:
    """Operations whose results the selective form keeps: matrix products, attention, reduce-scatter."""
    aten, collectives = torch.ops.aten, torch.ops._c10d_functional
    return {
        aten.mm.default,
        aten._scaled_mm.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        collectives.reduce_scatter_tensor.default,
    }


def checkpoint_activations(backbone: Any, *, full: bool) -> None:
    """Replace the backbone's units by checkpointed ones, in place (parameter names stay as they are).

    Args:
        backbone: declares `checkpoint_units()`, or else `wrap_units()`.
        full: recompute everything; otherwise keep the results of `saved_operations`.
    """
    wrap = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT, preserve_rng_state=True)
    if not full:
        saved = saved_operations()

        def policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if operation in saved else CheckpointPolicy.PREFER_RECOMPUTE

        wrap = partial(wrap, context_fn=partial(create_selective_checkpoint_contexts, policy))
    units = getattr(backbone, "checkpoint_units", backbone.wrap_units)()
    chosen = {id(unit) for unit in units}
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in chosen:
                setattr(parent, name, wrap(child))
